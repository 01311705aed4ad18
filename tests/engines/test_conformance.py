"""Real engines keep one contract: vLLM, llama.cpp's server, and transformers in this process.

All run the same weights: llama.cpp in four bits, the others what these stand for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import pytest

from arbitrage.core.errors import ContextTooLong
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import (
    SEPARATOR,
    GeneratedStep,
    Sampling,
    Source,
    Step,
    StopReason,
    Trajectory,
)
from services.engines.base import GeneratorEngine
from services.engines.loading import LoadedModel, LoadOptions, ModelKind, load_model
from services.engines.step_text import split_step
from services.engines.transformers_generator import TransformersGenerator
from services.generator.remote import running_remote_engine
from services.generator.settings import GeneratorSettings
from services.rpc.telemetry import Telemetry
from tests.engines import servers
from tests.engines.install import MODEL_FOLDER
from tests.engines.servers import CONTEXT_TOKENS, MODEL_NAME, EngineProcess, cutting_proxy
from tests.services.engine_requests import watch
from tests.services.running import until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

PROBLEMS = (
    "What is 12 + 30? Think step by step, with a blank line between steps.",
    "Ann owns 14 pens. Bob has 8 more than Ann. How many pens does Bob have?",
    "Name three colours, each in a paragraph of its own.",
)
STEP_TOKENS = 48
STEPS = 4


@pytest.fixture(scope="module")
def vllm() -> Iterator[EngineProcess]:
    with servers.vllm() as process:
        yield process


@pytest.fixture(scope="module")
def llamacpp() -> Iterator[EngineProcess]:
    with servers.llamacpp() as process:
        yield process


@pytest.fixture(scope="module")
def weights() -> LoadedModel:
    return load_model(str(MODEL_FOLDER), ModelKind.CAUSAL_LM, LoadOptions(dtype="float32"))


@asynccontextmanager
async def remote(url: str) -> AsyncIterator[GeneratorEngine]:
    """Yields a generator whose model a server runs."""
    told: dict[str, Any] = {
        "role": "draft",
        "model": MODEL_NAME,
        "engine": "openai",
        "engine_url": url,
        "engine_tokenizer": str(MODEL_FOLDER),
        "engine_prompt": "chat",
        # llama.cpp's server says neither.
        "engine_max_context_tokens": CONTEXT_TOKENS,
        "engine_revision": "test",
        # A machine that is busy with something else is no silent server.
        "engine_silence_timeout_s": 400.0,
    }
    async with running_remote_engine(GeneratorSettings(**told), Telemetry()) as engine:
        yield engine


@asynccontextmanager
async def in_process(weights: LoadedModel) -> AsyncIterator[GeneratorEngine]:
    """Yields a generator that runs the model itself."""
    engine = await asyncio.to_thread(partial(TransformersGenerator, weights, is_chat=True))
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture(params=["in-process", "vllm", "llamacpp"])
async def engine(
    request: pytest.FixtureRequest, weights: LoadedModel
) -> AsyncIterator[GeneratorEngine]:
    if request.param == "in-process":
        async with in_process(weights) as found:
            yield found
    else:
        async with remote(request.getfixturevalue(request.param).url) as found:
            yield found


@pytest.fixture(params=["vllm", "llamacpp"])
def process(request: pytest.FixtureRequest) -> EngineProcess:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, EngineProcess)
    return found


async def step_after(
    engine: GeneratorEngine, trajectory: Trajectory, **asked: int
) -> GeneratedStep:
    """Returns the next step under greedy decoding, which its deltas must join to."""
    request = StepRequest(
        trajectory, asked.get("max_tokens", STEP_TOKENS), entropy_token_count=3, stream_text=True
    )
    deltas, step = await watch(engine, request)
    assert "".join(deltas) == step.text
    return step


async def solution(engine: GeneratorEngine, problem: str) -> list[GeneratedStep]:
    """Returns the first steps of a problem's solution."""
    trajectory = Trajectory(problem)
    steps: list[GeneratedStep] = []
    while len(steps) < STEPS:
        steps.append(await step_after(engine, trajectory))
        trajectory = trajectory.append(_committed(steps[-1]))
        if steps[-1].stop_reason is StopReason.END_OF_SEQUENCE:
            break
    return steps


def _committed(step: GeneratedStep) -> Step:
    return Step(step.text, Source.DRAFT, step.stop_reason)


@pytest.mark.parametrize("problem", PROBLEMS)
async def test_steps_end_where_the_text_has_separators(
    engine: GeneratorEngine, problem: str
) -> None:
    is_continuation = False
    for step in await solution(engine, problem):
        closed, has_separator = split_step(step.text + SEPARATOR, is_continuation=is_continuation)
        assert (closed, has_separator) == (step.text, True)
        assert 0 < step.token_count <= STEP_TOKENS
        assert step.first_token_entropy is not None
        assert step.first_token_entropy > 0.0
        if step.stop_reason is StopReason.STEP_LENGTH:
            assert step.token_count == STEP_TOKENS
        else:
            assert step.stop_reason in {StopReason.SEPARATOR, StopReason.END_OF_SEQUENCE}
        is_continuation = step.is_cut


async def test_a_closed_answer_is_ended_by_the_model(engine: GeneratorEngine) -> None:
    # Steps that say all there is to say, so that the model ends whatever its precision.
    done = Trajectory("What is 2 + 2? Answer with a number.", (Step("4", Source.DRAFT),))
    step = await step_after(engine, done, max_tokens=200)
    steps = [step]
    while steps[-1].stop_reason is not StopReason.END_OF_SEQUENCE and len(steps) < 20:
        done = done.append(_committed(steps[-1]))
        steps.append(await step_after(engine, done, max_tokens=200))
    assert steps[-1].stop_reason is StopReason.END_OF_SEQUENCE


async def test_the_budget_cuts_a_step_and_the_next_goes_on(engine: GeneratorEngine) -> None:
    whole = (await solution(engine, PROBLEMS[1]))[0]
    trajectory = Trajectory(PROBLEMS[1])
    parts: list[GeneratedStep] = []
    while not parts or (parts[-1].is_cut and len(parts) < 20):
        parts.append(await step_after(engine, trajectory, max_tokens=5))
        trajectory = trajectory.append(_committed(parts[-1]))
    assert parts[0].is_cut
    assert all(part.token_count == 5 for part in parts[:-1])
    # Where a text is cut, its tokens may be others than the model's own; the beginning is the same.
    assert whole.text.startswith(parts[0].text)


async def test_all_engines_end_the_same_steps_for_the_same_reasons(
    weights: LoadedModel, vllm: EngineProcess, llamacpp: EngineProcess
) -> None:
    """Each engine is asked for the step after every prefix of the same solutions."""
    alike_count = step_count = 0
    async with (
        in_process(weights) as here,
        remote(vllm.url) as on_vllm,
        remote(llamacpp.url) as on_llama,
    ):
        for problem in PROBLEMS:
            trajectory = Trajectory(problem)
            for expected in await solution(here, problem):
                other = await step_after(on_vllm, trajectory)
                assert (other.text, other.stop_reason) == (expected.text, expected.stop_reason)
                assert other.token_count == expected.token_count
                assert other.prefill_token_count + other.cached_token_count == (
                    expected.prefill_token_count + expected.cached_token_count
                )
                # llama.cpp rounds otherwise, and at times to another token; what it writes alike
                # has to end alike.
                rounded = await step_after(on_llama, trajectory)
                if rounded.text.strip() == expected.text.strip():
                    assert rounded.stop_reason is expected.stop_reason
                    alike_count += 1
                step_count += 1
                trajectory = trajectory.append(_committed(expected))
    assert alike_count > step_count / 2


async def test_greedy_text_is_the_same_in_every_run(llamacpp: EngineProcess) -> None:
    runs = []
    for _ in range(2):
        async with remote(llamacpp.url) as engine:
            runs.append([await solution(engine, problem) for problem in PROBLEMS])
    assert runs[0] == runs[1]


# Not llama.cpp: what its cache holds of a prompt changes the last digits of a logit, and with them
# which of the unlikely tokens a seed draws.
@pytest.mark.parametrize("engine", ["in-process", "vllm"], indirect=True)
async def test_a_seed_draws_the_same_and_another_draws_otherwise(engine: GeneratorEngine) -> None:
    async def drawn(seed: int) -> str:
        sampling = Sampling(temperature=1.0, seed=seed)
        _, step = await watch(engine, StepRequest(Trajectory(PROBLEMS[2]), STEP_TOKENS, sampling))
        return step.text

    texts = [await drawn(1), await drawn(1), await drawn(2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


async def test_eight_requests_at_once_get_their_own_steps(engine: GeneratorEngine) -> None:
    problems = [f"{PROBLEMS[1]} And {number} more?" for number in range(8)]
    alone = [await step_after(engine, Trajectory(problem)) for problem in problems]
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(step_after(engine, Trajectory(problem))) for problem in problems]
    together = [call.result() for call in calls]
    assert [s.stop_reason for s in together] == [s.stop_reason for s in alone]
    assert [s.text for s in together] == [s.text for s in alone]


async def test_the_server_sees_a_step_that_is_left(process: EngineProcess) -> None:
    asked = StepRequest(Trajectory("Write a long story"), 1500, stream_text=True)
    async with remote(process.url) as engine:
        before = await asyncio.to_thread(process.work)
        async with aclosing(engine.generate_step(asked)) as items:
            assert isinstance(await anext(items), str)
        assert engine.stats().running_requests == 0
        # The server tells whoever asks, and nobody else.
        while not await asyncio.to_thread(process.has_stopped, before, 1500):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def test_leaving_stops_the_model_in_this_process(weights: LoadedModel) -> None:
    asked = StepRequest(Trajectory("Write a long story"), 1500, stream_text=True)
    async with in_process(weights) as engine:
        async with aclosing(engine.generate_step(asked)) as items:
            assert isinstance(await anext(items), str)
        await until(lambda: engine.stats().running_requests == 0)
        assert engine.stats().decoded_token_count < 200


async def test_a_connection_that_breaks_mid_stream_costs_nothing_but_time(
    process: EngineProcess,
) -> None:
    async with cutting_proxy(process.url) as proxy, remote(proxy.url) as engine:
        whole = await step_after(engine, Trajectory(PROBLEMS[1]))
        proxy.cut_after_bytes = 1500
        again = await step_after(engine, Trajectory(PROBLEMS[1]))
        assert not proxy.is_armed, "the answer was too short to be cut"
    assert (again.text, again.stop_reason) == (whole.text, whole.stop_reason)


async def test_what_does_not_fit_the_context_is_refused(engine: GeneratorEngine) -> None:
    with pytest.raises(ContextTooLong, match="does not fit the context"):
        await step_after(engine, Trajectory("one two " * 5000))
