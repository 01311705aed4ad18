"""TGI behind a generator, with requests and answers as its published description has them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import httpx2
import pytest

from arbitrage.core.errors import (
    ArbitrageError,
    ContextTooLong,
    Internal,
    Overloaded,
    TargetUnavailable,
)
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import ModelIdentity, Sampling, StopReason, Trajectory
from services.engines.engine_http import EngineSetupError, HttpOptions, HttpServer, ServerRefused
from services.engines.engine_prompts import PlainText
from services.engines.remote_generator import RemoteGenerator, RemoteModel
from services.engines.tgi_server import TgiServer
from tests.services.engine_requests import watch, write
from tests.services.http_servers import Handler, HttpReply, HttpRequest, HttpTestServer, http_server
from tests.services.running import until

pytest.importorskip("jsonschema")
from tests.services.tgi_servers import DESCRIPTION, END_TOKEN, Description, FakeTgi

pytestmark = pytest.mark.skipif(
    not DESCRIPTION.is_file(), reason=f"needs {DESCRIPTION.name} of the shared data"
)
ASKED = StepRequest(Trajectory("1 + 1?"), max_tokens=20)
TWO_STEPS = ["1", " + 1", " = 2", ".\n", "\n", "So", END_TOKEN]


@asynccontextmanager
async def generator(
    handler: Handler, silence_timeout_s: float = 60.0
) -> AsyncIterator[tuple[RemoteGenerator, HttpTestServer]]:
    """Yields a generator whose TGI is `handler`; at the end nothing broke the description."""
    async with http_server(handler) as server:
        options = HttpOptions(server.url, "sesame", silence_timeout_s=silence_timeout_s)
        tgi = await asyncio.to_thread(lambda: TgiServer(HttpServer(options)))
        try:
            served = await tgi.describe("smol")
            model = RemoteModel(
                ModelIdentity("smol", served.revision),
                PlainText(),
                None,
                served.max_context_tokens or 0,
                8,
                TargetUnavailable,
            )
            yield RemoteGenerator(tgi, model), server
        finally:
            await tgi.close()
    if isinstance(handler, FakeTgi):
        assert handler.violations == []


@pytest.mark.parametrize(
    ("tokens", "text", "reason", "token_count"),
    [
        (TWO_STEPS, "1 + 1 = 2.", StopReason.SEPARATOR, 5),
        (["Two", ".\n\n"], "Two.", StopReason.SEPARATOR, 2),
        (["Two", "\n\n"], "Two", StopReason.SEPARATOR, 2),
        # TGI looks for a stop sequence at the end of what it wrote, and so passes over this one.
        (["Two", ".\n\nSo", " on"], "Two.", StopReason.SEPARATOR, 2),
        (["Two", END_TOKEN], "Two", StopReason.END_OF_SEQUENCE, 2),
        (["a", "b", "c"], "abc", StopReason.STEP_LENGTH, 3),
    ],
)
async def test_each_end_of_a_step_is_read_from_the_details(
    tokens: list[str], text: str, reason: StopReason, token_count: int
) -> None:
    async with generator(FakeTgi(tokens)) as (engine, _):
        deltas, step = await watch(engine, StepRequest(Trajectory("1?"), 20, stream_text=True))
    assert (step.text, step.stop_reason, step.token_count) == (text, reason, token_count)
    assert "".join(deltas) == text


async def test_counts_revision_and_context_come_from_the_server() -> None:
    async with generator(FakeTgi(TWO_STEPS)) as (engine, _):
        step = await write(engine, ASKED)
        assert engine.max_context_tokens == 2048
    assert step.prefill_token_count == 7
    assert len(step.model.revision) == 16


async def test_what_is_drawn_is_said_as_tgi_takes_it() -> None:
    fake = FakeTgi(TWO_STEPS)
    async with generator(fake) as (engine, server):
        await write(engine, replace(ASKED, sampling=Sampling(0.0, 0.9, 40, 7)))
        await write(engine, StepRequest(Trajectory("1?"), 9, Sampling(0.7, 0.9, 40, 0)))
        await write(engine, StepRequest(Trajectory("1?"), 9, Sampling(1.0)))
    greedy, drawn, free = (body["parameters"] for body in fake.bodies)
    assert greedy["do_sample"] is False
    assert not {"temperature", "top_p", "top_k", "seed"} & {k for k, v in greedy.items() if v}
    assert (drawn["temperature"], drawn["top_p"], drawn["top_k"]) == (0.7, 0.9, 40)
    assert drawn["seed"] > 0
    assert free["do_sample"] is True
    assert free["stop"] == ["\n\n"]
    keys = {r.headers["authorization"] for r in server.requests}
    assert keys == {"Bearer sesame"}


async def test_entropy_is_of_the_tokens_that_the_server_names() -> None:
    asked = StepRequest(Trajectory("1 + 1?"), max_tokens=20, entropy_token_count=2)
    async with generator(FakeTgi(TWO_STEPS)) as (engine, _):
        step = await write(engine, asked)
    assert step.first_token_entropy == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("in_stream", [False, True])
@pytest.mark.parametrize(
    ("status", "said", "kind", "error"),
    [
        (422, "`stop` is no list", "validation", Internal),
        (422, "`inputs` tokens must be <= 9 context", "validation", ContextTooLong),
        (422, "`inputs` must have less than 9 tokens. Given: 12", "validation", ContextTooLong),
        (424, "Request failed during generation", "generation", TargetUnavailable),
        (429, "Model is overloaded", "overloaded", Overloaded),
        (500, "Incomplete generation", "incomplete_generation", TargetUnavailable),
        (503, "unhealthy", "healthcheck", TargetUnavailable),
    ],
)
async def test_an_error_of_tgi_is_an_error_of_ours(
    status: int, said: str, kind: str, error: type[ArbitrageError], *, in_stream: bool
) -> None:
    fake = FakeTgi(TWO_STEPS, refusal=(status, said, kind), refuses_in_stream=in_stream)
    async with generator(fake) as (engine, _):
        with pytest.raises(error) as caught:
            await write(engine, ASKED)
    if error is not ContextTooLong:
        assert said in str(caught.value)


async def test_a_refusal_is_read_by_the_servers_own_words() -> None:
    http = HttpServer(HttpOptions("http://long-context.example"))
    try:
        refusal = http.refusal(httpx2.Response(400), b'{"error": "no seed"}')
    finally:
        await http.close()
    assert "long-context" in str(refusal)
    assert isinstance(refusal, ServerRefused)
    assert refusal.said == "no seed"


async def test_a_full_tgi_says_when_to_come_back() -> None:
    async def full(_: HttpRequest, reply: HttpReply) -> None:
        body = {"error": "full", "error_type": "overloaded"}
        await reply.answer(429, body, Retry_After="3")

    async with generator(_Failing(full)) as (engine, _):
        with pytest.raises(Overloaded) as caught:
            await write(engine, ASKED)
    assert caught.value.retry_after_s == 3.0


@dataclass
class _Failing:
    """A TGI that describes itself and then does what a test wants."""

    fail: Handler

    async def __call__(self, request: HttpRequest, reply: HttpReply) -> None:
        if request.method == "GET":
            await FakeTgi([])(request, reply)
        else:
            await self.fail(request, reply)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"data: {oops\n\n", "cannot be read"),
        (b"data: 5\n\n", "cannot be read"),
        (b'data: {"index": 1}\n\n', "cannot be read"),
        (b'data: {"index": 1, "token": {"text": "\xe2\x82"}}\n\n', "not UTF-8"),
        (b'data: {"index": 1, "token": {"text": "a"}}\n\n', "without its details"),
        (b"", "without its details"),
    ],
)
async def test_a_stream_that_makes_no_sense_is_unavailable(sent: bytes, said: str) -> None:
    async def stream(_: HttpRequest, reply: HttpReply) -> None:
        await reply.begin()
        if sent:
            await reply.send(sent)
        await reply.end()

    async with generator(_Failing(stream)) as (engine, _):
        with pytest.raises(TargetUnavailable, match=said):
            await write(engine, ASKED)


async def test_a_tgi_that_falls_silent_is_given_up() -> None:
    async def hang(_: HttpRequest, reply: HttpReply) -> None:
        await asyncio.Event().wait()

    async with generator(_Failing(hang), 0.2) as (engine, server):
        with pytest.raises(TargetUnavailable, match="silent"):
            await write(engine, ASKED)
        await until(lambda: server.gone_count == 1)


async def test_leaving_closes_the_connection() -> None:
    async def slow(_: HttpRequest, reply: HttpReply) -> None:
        await reply.begin()
        token = {"id": 1, "text": "Two", "logprob": -1.0, "special": False}
        await reply.event({"index": 1, "token": token})
        await asyncio.Event().wait()

    async with generator(_Failing(slow)) as (engine, server):
        asked = StepRequest(Trajectory("1?"), 20, stream_text=True)
        async with aclosing(engine.generate_step(asked)) as items:
            assert await anext(items) == "Two"
        await until(lambda: server.gone_count == 1)
        assert engine.stats().running_requests == 0


async def test_one_connection_serves_step_after_step() -> None:
    async with generator(FakeTgi(TWO_STEPS)) as (engine, server):
        for _ in range(3):
            await write(engine, ASKED)
    assert len(server.requests) > 3
    assert server.connection_count == 1


async def test_a_tgi_with_another_model_is_refused_by_name() -> None:
    async with http_server(FakeTgi([])) as server:
        tgi = await asyncio.to_thread(lambda: TgiServer(HttpServer(HttpOptions(server.url))))
        with pytest.raises(EngineSetupError, match="the one that it does: smol") as caught:
            await tgi.describe("llama")
        await tgi.close()
    assert caught.value.setting == "model"


def test_the_description_refuses_what_tgi_would() -> None:
    description = Description()
    good = {"inputs": "a", "parameters": {"stop": ["\n\n"], "max_new_tokens": 5, "seed": None}}
    assert description.violations("GenerateRequest", good) == []
    for parameters in ({"stop": ["a"] * 5}, {"temperature": 0.0}, {"seed": 0}, {"top_p": 1.5}):
        bad = {"inputs": "a", "parameters": parameters}
        assert description.violations("GenerateRequest", bad)
    assert description.violations("StreamResponse", {"index": 1})
    assert description.violations("ErrorResponse", {"error": "no type"})
