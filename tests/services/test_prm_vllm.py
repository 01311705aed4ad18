"""A PRM that vLLM runs: its settings, its start, what is sent, and what becomes of each answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from arbitrage.core.errors import (
    ArbitrageError,
    ContextTooLong,
    Internal,
    NotServing,
    Overloaded,
    PrmUnavailable,
)
from arbitrage.core.steps import Source, Step
from services.engines.vllm_prm import VllmPrm
from services.prm.remote import running_vllm_prm
from services.prm.settings import PrmSettings
from services.router.settings import RouterSettings
from services.rpc.program import StartError
from services.rpc.settings import SettingsError, read_settings
from services.rpc.telemetry import Telemetry
from tests.services.engine_models import START, byte_tokenizer
from tests.services.http_servers import HttpReply, HttpRequest, http_server
from tests.services.running import until
from tests.services.test_prm_families import chat_tokenizer

TRL = "trl-token-classification"
ENTRY = {"id": "prm", "root": "/models/prm@1", "max_model_len": 200}
STEPS = tuple(Step(text, Source.DRAFT) for text in ("14 + 8", "so\n\n22", "22."))
Rows = Callable[[list[int]], Any]


def logits_of(ids: list[int]) -> list[list[float]]:
    """Returns a row per token, whose score is another one at each place."""
    return [[0.0, 0.1 * place - 2] for place in range(len(ids))]


@dataclass
class FakeVllm:
    """Answers `/pooling` with `rows` of the ids, or with `refusal`; `may_answer` holds it up."""

    rows: Rows = logits_of
    entry: dict[str, Any] = field(default_factory=lambda: dict(ENTRY))
    refusal: tuple[int, Any] | None = None
    may_answer: asyncio.Event | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, request: HttpRequest, reply: HttpReply) -> None:
        """Answers one request."""
        if request.path == "/v1/models":
            await reply.answer(200, {"object": "list", "data": [self.entry]})
            return
        assert (request.method, request.path) == ("POST", "/pooling")
        self.bodies.append(request.json)
        if self.may_answer is not None:
            await self.may_answer.wait()
        if self.refusal is not None:
            status, said = self.refusal
            await reply.answer(status, said, Retry_After="7")
            return
        [ids] = request.json["input"]
        item = {"index": 0, "object": "pooling", "data": self.rows(ids)}
        await reply.answer(200, {"object": "list", "model": "prm", "data": [item]})


@pytest.fixture
async def tokenizer(tmp_path: Path) -> str:
    """Writes a tokenizer with a start token, and returns its folder."""
    await asyncio.to_thread(byte_tokenizer(adds_start=True).save_pretrained, tmp_path)
    return str(tmp_path)


@asynccontextmanager
async def started(fake: FakeVllm, tokenizer: str, **fields: Any) -> AsyncIterator[VllmPrm]:
    """Starts the engine as the service does, on a server that answers like `fake`."""
    async with http_server(fake) as server:
        given = {"model": "prm", "engine": "vllm", "engine_url": server.url, "prm_family": TRL}
        told = PrmSettings(**{**given, "engine_tokenizer": tokenizer, **fields})
        async with running_vllm_prm(told, Telemetry()) as engine:
            yield engine


async def refusal(fake: FakeVllm, tokenizer: str, **fields: Any) -> str:
    """Returns why the service does not start."""
    with pytest.raises(StartError) as caught:
        async with started(fake, tokenizer, **fields):
            pass
    return str(caught.value)


async def test_all_steps_of_a_call_are_one_request_of_ids_read_at_their_ends(
    tokenizer: str,
) -> None:
    fake = FakeVllm()
    async with started(fake, tokenizer) as engine:
        before = len(fake.bodies)
        both = await engine.score_steps("Ann?", STEPS)
        last = await engine.score_steps("Ann?", STEPS, 2)
        none = await engine.score_steps("Ann?", STEPS, 3)
    assert len(fake.bodies) == before + 2
    ids, end = byte_tokenizer().encode(START + "Ann?"), byte_tokenizer().encode("\n\n")
    assert len(end) == 1
    positions = []
    for step in STEPS:
        ids += [*byte_tokenizer().encode(step.text), *end]
        positions.append(len(ids) - 1)
    assert fake.bodies[-1] == {
        "model": "prm",
        "input": [ids],
        "task": "token_classify",
        "use_activation": False,
        "encoding_format": "float",
    }
    scores = [1 / (1 + 2.718281828459045 ** -logits_of(ids)[at][1]) for at in positions]
    assert both.values == pytest.approx(scores)
    assert (last.values, none.values) == (both.values[2:], ())
    assert (both.prefill_token_count, both.cached_token_count) == (len(ids), 0)
    assert engine.family == TRL
    assert engine.max_context_tokens == 200
    assert engine.stats().prefill_token_count > 2 * len(ids)


async def test_a_family_is_told_by_the_config_beside_the_tokenizer(tmp_path: Path) -> None:
    await asyncio.to_thread(chat_tokenizer().save_pretrained, tmp_path)
    config = tmp_path / "config.json"
    await asyncio.to_thread(config.write_text, '{"architectures": ["Qwen2ForProcessRewardModel"]}')
    fake = FakeVllm()
    async with started(fake, str(tmp_path), prm_family=None) as engine:
        assert engine.family == "qwen2.5-math-prm"
        await engine.score_steps("Ann?", STEPS)
    written = str(chat_tokenizer().decode(fake.bodies[-1]["input"][0]))
    assert written.endswith("assistant\n14 + 8<extra_0>so\n\n22<extra_0>22.<extra_0>")


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (lambda ids: [0.1, 0.2, 0.7], "got one vector of 3 for the whole text"),
        (lambda ids: [[0.5] * 64 for _ in ids], "got a row of 64"),
        (lambda ids: [[1.5] for _ in ids], "got a row of 1"),
        (lambda ids: [], "got 0 rows"),
        (lambda ids: logits_of(ids)[1:], "rows of 2 numbers, one for each token, got"),
        (lambda ids: "aGVsbG8=", "got 'aGVsbG8='"),
        (lambda ids: [["a", "b"] for _ in ids], "got ['a', 'b']"),
        (lambda ids: [[0.0, float("nan")] for _ in ids], "got [0.0, nan]"),
        (lambda ids: [[0.25, 0.75] for _ in ids], "sent probabilities where it was asked for"),
    ],
)
async def test_a_head_that_is_not_the_familys_is_refused_at_the_start_and_later(
    tokenizer: str, rows: Rows, found: str
) -> None:
    said = await refusal(FakeVllm(rows), tokenizer)
    assert said.startswith("ARBITRAGE_ENGINE_URL: http://127.0.0.1")
    assert found in said
    assert "; serve " in said
    if "probabilities" in found:
        return
    fake = FakeVllm()
    async with started(fake, tokenizer) as engine:
        fake.rows = rows
        with pytest.raises(PrmUnavailable, match=re.escape(found)):
            await engine.score_steps("Ann?", STEPS)


async def test_a_start_that_cannot_be_names_the_setting_and_the_fix(tokenizer: str) -> None:
    fake = FakeVllm()
    for fields, expected in (
        ({"model": "other"}, "ARBITRAGE_MODEL: .* serves no model 'other'; .* it does: prm"),
        ({"engine_url": "http://127.0.0.1:1"}, "ARBITRAGE_ENGINE_URL: .*start the server first"),
        ({"engine_tokenizer": "nowhere"}, "ARBITRAGE_ENGINE_TOKENIZER: .*no such tokenizer"),
        ({"prm_family": None}, "ARBITRAGE_PRM_FAMILY: .*no config.json.*; set it to one that vLLM"),
        (
            {"prm_family": "skywork-o1-open-prm"},
            "ARBITRAGE_PRM_FAMILY: vLLM has no head for skywork.*ARBITRAGE_ENGINE=transformers",
        ),
        ({"prm_family": "math-shepherd"}, "ARBITRAGE_PRM_FAMILY: vLLM has no head for math-sheph"),
        (
            {"prm_family": "qwen2.5-math-prm"},
            "ARBITRAGE_ENGINE_TOKENIZER: .*no single token for '<extra_0>'",
        ),
    ):
        assert re.match(expected, await refusal(fake, tokenizer, **fields)), fields
    no_pooling = FakeVllm(refusal=(404, {"detail": "Not Found"}))
    said = await refusal(no_pooling, tokenizer)
    assert re.match("ARBITRAGE_ENGINE_URL: no pooling: .*404: Not Found; serve .*--runner", said)


async def test_what_the_server_does_not_say_has_to_be_set(tokenizer: str) -> None:
    silent = FakeVllm(entry={"id": "prm"})
    said = await refusal(silent, tokenizer)
    assert said.startswith("ARBITRAGE_ENGINE_REVISION: is not set")
    said = await refusal(silent, tokenizer, engine_revision="r1")
    assert said.startswith("ARBITRAGE_ENGINE_MAX_CONTEXT_TOKENS: is not set")
    told = {"engine_revision": "r1", "engine_max_context_tokens": 64}
    async with started(silent, tokenizer, **told) as engine:
        assert (engine.identity.revision, engine.max_context_tokens) == ("r1", 64)


async def test_what_does_not_fit_the_context_is_not_sent(tokenizer: str) -> None:
    fake = FakeVllm()
    async with started(fake, tokenizer) as engine:
        before = len(fake.bodies)
        for text in ("8" * 197, "8" * 100_000):
            with pytest.raises(ContextTooLong):
                await engine.score_steps("Ann?", (Step(text, Source.DRAFT),))
        assert len(fake.bodies) == before
        # A start token, four of the problem, and one that ends the step.
        await engine.score_steps("Ann?", (Step("8" * 194, Source.DRAFT),))
        assert len(fake.bodies[-1]["input"][0]) == 200


@pytest.mark.parametrize(
    ("status", "raised", "said"),
    [
        (429, Overloaded, "answered 429: busy"),
        (500, PrmUnavailable, "answered 500: busy"),
        (404, PrmUnavailable, "answered 404: busy"),
        (400, Internal, "answered 400: busy"),
    ],
)
async def test_a_status_means_what_it_means_of_every_engine(
    tokenizer: str, status: int, raised: type[ArbitrageError], said: str
) -> None:
    fake = FakeVllm()
    async with started(fake, tokenizer) as engine:
        fake.refusal = status, {"error": {"message": "busy"}}
        with pytest.raises(raised, match=said) as caught:
            await engine.score_steps("Ann?", STEPS)
        assert engine.stats().running_requests == 0
    if isinstance(caught.value, Overloaded):
        assert caught.value.retry_after_s == 7.0


async def test_a_server_that_hangs_is_given_up_and_calls_beyond_the_bound_are_refused(
    tokenizer: str,
) -> None:
    fake = FakeVllm()
    bounds = {"max_batch": 1, "max_queue": 0, "engine_timeout_s": 1.0}
    async with started(fake, tokenizer, **bounds) as engine:
        fake.may_answer = asyncio.Event()
        first = asyncio.ensure_future(engine.score_steps("Ann?", STEPS))
        await until(lambda: engine.stats().running_requests == 1)
        with pytest.raises(Overloaded, match="1 calls of the model's server are under way"):
            await engine.score_steps("Ann?", STEPS)
        with pytest.raises(PrmUnavailable, match=r"was silent for 1 s"):
            await first
        await engine.close()
        with pytest.raises(NotServing):
            await engine.score_steps("Ann?", STEPS)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "ARBITRAGE_ENGINE_URL: is not set, but ARBITRAGE_ENGINE is vllm"),
        ({"ENGINE_URL": "http://v:1"}, "ARBITRAGE_ENGINE_TOKENIZER: is not set, but"),
        ({"ENGINE_URL": "v:1"}, "ARBITRAGE_ENGINE_URL: expected http://host:port or https://"),
        ({"ENGINE": "oip", "ENGINE_URL": "v:1", "ENGINE_REVISION": "r"}, "goes with .*=vllm"),
        ({"ENGINE": "transformers", "ENGINE_TOKENIZER": "t"}, "goes with ARBITRAGE_ENGINE=vllm"),
        ({"ENGINE": "tgi"}, "ARBITRAGE_ENGINE: expected one of transformers, oip or vllm"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(variables: dict[str, str], said: str) -> None:
    given = {"MODEL": "prm", "ENGINE": "vllm", **variables}
    with pytest.raises(SettingsError) as caught:
        read_settings(PrmSettings, {f"ARBITRAGE_{name}": value for name, value in given.items()})
    assert re.search(said, str(caught.value))


def test_an_address_is_taken_with_v1_and_a_grpc_address_is_left_as_it_is() -> None:
    told: dict[str, Any] = {"model": "prm", "engine": "vllm", "engine_tokenizer": "t"}
    assert PrmSettings(**told, engine_url="http://v:1/v1/").engine_url == "http://v:1"
    elsewhere: dict[str, Any] = {"model": "prm", "engine": "oip"}
    assert PrmSettings(**elsewhere, engine_url="v:1").engine_url == "v:1"
    with pytest.raises(ValidationError, match="engine"):
        RouterSettings(**{**told, "engine_url": "http://v:1"})
