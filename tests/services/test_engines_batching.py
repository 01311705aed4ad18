"""A request never notices its neighbours: not in its text, its bounds or its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from arbitrage.core.errors import ContextTooLong, Internal, NotServing, Overloaded
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GeneratedStep, Source, Step, Trajectory
from services.engines.loading import LoadedModel, ModelKind, load_model
from tests.services.engine_models import byte_tokenizer, random_model, save, until
from tests.services.engine_requests import (
    Start,
    after,
    generators,
    load_reciter,
    prompt_ids,
    reciting,
    walk,
    write,
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    reference = save(tmp_path_factory.mktemp("models") / "random", random_model())
    return load_model(reference, ModelKind.CAUSAL_LM)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model that never ends a step: after an "a" a "b", after a "b" an "a"."""
    return load_reciter(tmp_path_factory.mktemp("endless"), ("ab",), ends=False)


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with generators() as start_one:
        yield start_one


async def test_greedy_output_is_the_same_alone_and_among_32(
    start: Start, loaded: LoadedModel
) -> None:
    requests = [StepRequest(walk(number, number % 5), 12) for number in range(32)]
    alone = [await write(start(loaded), request) for request in requests]

    engine = start(loaded, max_batch=32, prefill_chunk_tokens=50)
    together = await asyncio.gather(*(write(engine, request) for request in requests))

    assert len({step.text for step in alone}) > 16  # the model says different things
    assert [(s.text, s.stop_reason, s.token_count) for s in together] == [
        (s.text, s.stop_reason, s.token_count) for s in alone
    ]


async def test_a_known_prefix_costs_nothing_and_changes_nothing(
    start: Start, loaded: LoadedModel
) -> None:
    warm = start(loaded)
    trajectory = Trajectory("A problem of some length")
    known_count = 0
    for _ in range(4):
        prompt_count = len(prompt_ids(loaded, trajectory))
        step = await write(warm, StepRequest(trajectory, 12))
        cold = await write(start(loaded), StepRequest(trajectory, 12))

        assert (step.text, step.stop_reason) == (cold.text, cold.stop_reason)
        assert step.cached_token_count == known_count
        assert step.prefill_token_count == prompt_count - known_count
        assert (cold.cached_token_count, cold.prefill_token_count) == (0, prompt_count)
        # Another writer's step is committed: only the prompt, not what was decoded, is shared.
        trajectory = trajectory.append(Step("Zed has 1.", Source.TARGET))
        written = loaded.tokenizer.encode(step.text)
        committed = loaded.tokenizer.encode("Zed has 1.")
        agreed = next(
            (i for i, (a, b) in enumerate(zip(written, committed, strict=False)) if a != b), 0
        )
        known_count = prompt_count + agreed


async def test_an_accepted_step_is_known_down_to_its_last_token(
    start: Start, tmp_path: Path
) -> None:
    loaded = await reciting(tmp_path, ("Q", "abc", "\n\n"))
    engine = start(loaded)
    step = await write(engine, StepRequest(after("Q"), 20))

    accepted = after("Q").append(Step(step.text, Source.DRAFT))
    following = await write(engine, StepRequest(accepted, 2))

    # The separator was decoded but never fed: it is the one token left to compute.
    assert following.prefill_token_count == 1
    assert following.cached_token_count == len(prompt_ids(loaded, accepted)) - 1


async def test_asking_again_computes_one_token(start: Start, loaded: LoadedModel) -> None:
    engine = start(loaded)
    first = await write(engine, StepRequest(walk(0, 3), 10))
    second = await write(engine, StepRequest(walk(0, 3), 10))

    assert second.text == first.text
    assert second.prefill_token_count == 1


async def test_closing_the_iterator_stops_the_model_within_one_token(
    start: Start, endless: LoadedModel
) -> None:
    engine = start(endless)
    stream = engine.generate_step(StepRequest(after("a"), 3500, stream_text=True))
    async for _ in stream:
        if engine.stats().decoded_token_count >= 5:
            break
    await stream.aclose()
    at_close = engine.stats().decoded_token_count
    await until(lambda: engine.stats().running_requests == 0)

    assert engine.stats().decoded_token_count - at_close <= 1


async def test_cancelling_the_task_stops_the_model_within_one_token(
    start: Start, endless: LoadedModel
) -> None:
    engine = start(endless)
    task = asyncio.create_task(write(engine, StepRequest(after("a"), 3500)))
    await until(lambda: engine.stats().decoded_token_count >= 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    at_cancel = engine.stats().decoded_token_count
    await until(lambda: engine.stats().running_requests == 0)

    assert engine.stats().decoded_token_count - at_cancel <= 1


async def test_a_cancelled_step_leaves_its_prefix_known(
    start: Start, endless: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(endless)
    prefix = "Long enough to be worth a copy: a"
    stream = engine.generate_step(StepRequest(after(prefix), 3500, stream_text=True))
    await anext(stream)
    await stream.aclose()

    following = await write(engine, StepRequest(after(prefix + "b"), 1))

    assert following.cached_token_count == len(prompt_ids(endless, after(prefix)))
    assert engine.stats().running_requests == 0
    assert not caplog.records


async def test_a_full_queue_refuses_at_once(start: Start, endless: LoadedModel) -> None:
    engine = start(endless, max_batch=1, max_queue=1)
    request = StepRequest(after("a"), 3500)
    tasks = [asyncio.create_task(write(engine, request)) for _ in range(2)]
    await until(lambda: engine.stats().decoded_token_count > 0)

    with pytest.raises(Overloaded) as refusal:
        await write(engine, request)

    assert refusal.value.retry_after_s > 0
    stats = engine.stats()
    assert (stats.running_requests, stats.queued_requests) == (1, 1)
    # Who leaves the queue makes room in it.
    tasks[1].cancel()
    await until(lambda: engine.stats().queued_requests == 0)
    waiting = asyncio.create_task(write(engine, replace(request, max_tokens=1)))
    tasks[0].cancel()
    assert (await waiting).token_count == 1


async def test_keys_and_values_never_take_more_than_they_may(
    start: Start, loaded: LoadedModel
) -> None:
    per_token = loaded.packed.kv_shape.bytes_per_token
    engine = start(loaded, cache_bytes=200 * per_token)
    largest = 0

    async def write_and_look(number: int) -> GeneratedStep:
        nonlocal largest
        step = await write(engine, StepRequest(walk(number, number % 4), 20))
        largest = max(largest, engine.stats().cache_bytes)
        return step

    crowded = await asyncio.gather(*(write_and_look(number) for number in range(12)))
    calm = [await write(start(loaded), StepRequest(walk(n, n % 4), 20)) for n in range(12)]

    assert [step.text for step in crowded] == [step.text for step in calm]
    assert 0 < largest <= engine.stats().cache_capacity_bytes <= 200 * per_token
    assert sum(kv._storage.nbytes for kv in engine._scheduler._kvs.values()) == (
        engine.stats().cache_bytes
    )


async def test_a_prompt_that_does_not_fit_is_refused_before_any_work(
    start: Start, loaded: LoadedModel
) -> None:
    engine = start(loaded, cache_bytes=100 * loaded.packed.kv_shape.bytes_per_token)
    assert engine.max_context_tokens == 100
    prompt_count = len(prompt_ids(loaded, walk(0, 3)))

    with pytest.raises(ContextTooLong, match=f"100 tokens, got {prompt_count} tokens with"):
        await write(engine, StepRequest(walk(0, 3), 101 - prompt_count))
    assert engine.stats().prefill_token_count == 0

    step = await write(engine, StepRequest(walk(0, 3), 100 - prompt_count))
    assert step.token_count > 0


async def test_long_prompts_go_in_by_chunks_while_others_decode(
    start: Start, loaded: LoadedModel
) -> None:
    requests = [StepRequest(Trajectory(letter * 300), 10) for letter in "xy"]
    requests.append(StepRequest(walk(0, 0), 10))
    whole = [await write(start(loaded, prefill_chunk_tokens=2000), r) for r in requests]
    row_lengths: list[int] = []
    hook = loaded.packed.model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: row_lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )

    engine = start(loaded, prefill_chunk_tokens=16)
    parts = await asyncio.gather(*(write(engine, request) for request in requests))

    hook.remove()
    assert [step.text for step in parts] == [step.text for step in whole]
    # Sixteen prompt tokens in all, and a token of each that decodes.
    assert 16 <= max(row_lengths) <= 16 + 2


async def test_closing_the_engine_ends_what_runs_and_refuses_what_comes(
    start: Start, endless: LoadedModel
) -> None:
    engine = start(endless, max_batch=1)
    tasks = [asyncio.create_task(write(engine, StepRequest(after("a"), 3500))) for _ in range(2)]
    await until(lambda: engine.stats().decoded_token_count > 0)

    await engine.close()

    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [NotServing, NotServing]
    with pytest.raises(NotServing):
        await write(engine, StepRequest(walk(0, 0), 2))


async def test_a_defect_ends_its_requests_and_the_engine_goes_on(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # This tokenizer knows a token for which the model has no embedding.
    extra = [f"<{number}>" for number in range(20)]
    reference = save(tmp_path, random_model(), byte_tokenizer(extra))
    loaded = await asyncio.to_thread(load_model, reference, ModelKind.CAUSAL_LM)
    engine = start(loaded)

    with pytest.raises(Internal):
        await write(engine, StepRequest(Trajectory("<19>"), 4))
    step = await write(engine, StepRequest(Trajectory("fine"), 4))

    assert step.token_count > 0
    assert "a forward failed" in caplog.text
    assert engine.stats().running_requests == 0


async def test_stats_count_what_was_done(start: Start, loaded: LoadedModel) -> None:
    engine = start(loaded)
    steps = [await write(engine, StepRequest(walk(0, n), 10)) for n in range(3)]
    stats = engine.stats()

    assert stats.decoded_token_count == sum(step.token_count for step in steps)
    assert stats.prefill_token_count == sum(step.prefill_token_count for step in steps)
    assert stats.cached_token_count == sum(step.cached_token_count for step in steps)
    assert stats.cached_token_count > 0
