"""An OpenAI-compatible server behind a generator: what it says, and what goes wrong with it."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from arbitrage.core.errors import (
    ArbitrageError,
    ContextTooLong,
    Internal,
    NotServing,
    Overloaded,
    TargetUnavailable,
)
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import (
    ModelIdentity,
    Sampling,
    Source,
    Step,
    StopReason,
    Trajectory,
)
from services.engines.engine_http import HttpOptions, HttpServer
from services.engines.engine_prompts import PlainText
from services.engines.openai_server import OpenAiServer
from services.engines.remote_generator import RemoteGenerator, RemoteModel
from services.engines.tokenization import PieceTokenizer
from tests.services.certificates import Authority
from tests.services.engine_models import byte_tokenizer
from tests.services.engine_requests import watch, write
from tests.services.http_servers import Handler, HttpReply, HttpRequest, HttpTestServer, http_server
from tests.services.openai_servers import END_TOKEN, Dialect, FakeOpenAi
from tests.services.running import until

ASKED = StepRequest(Trajectory("1 + 1?"), max_tokens=20)
TWO_STEPS = ["1", " + 1", " = 2", ".", "\n\n", "So", END_TOKEN]


async def connected(url: str, **options: Any) -> RemoteGenerator:
    """Returns a generator at `url` that knows what the server takes."""
    tokenizer = options.pop("tokenizer", None)
    logprobs = options.pop("top_logprobs", 5)
    http = await asyncio.to_thread(HttpServer, HttpOptions(url, **options))
    server = OpenAiServer(http, logprobs)
    try:
        served = await server.describe("smol")
    except BaseException:
        await server.close()
        raise
    identity = ModelIdentity("smol", served.revision)
    model = RemoteModel(
        identity, PlainText(), tokenizer, served.max_context_tokens or 100, 8, TargetUnavailable
    )
    return RemoteGenerator(server, model)


@asynccontextmanager
async def generator(
    handler: Handler, **options: Any
) -> AsyncIterator[tuple[RemoteGenerator, HttpTestServer]]:
    """Yields a generator whose server is `handler`, and that server."""
    async with http_server(handler) as server:
        engine = await connected(server.url, **options)
        try:
            yield engine, server
        finally:
            await engine.close()


@pytest.fixture
def tokenizer() -> PieceTokenizer:
    return PieceTokenizer(byte_tokenizer(adds_start=True))


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llama", "llama-server"])
class TestEveryDialect:
    async def test_a_step_ends_at_the_separator_and_leaves_it_out(self, dialect: Dialect) -> None:
        async with generator(FakeOpenAi(TWO_STEPS, dialect)) as (engine, _):
            step = await write(engine, ASKED)
        assert (step.text, step.stop_reason) == ("1 + 1 = 2.", StopReason.SEPARATOR)
        assert step.token_count == 5

    @pytest.mark.parametrize("halves", [["\n", "\n"], [".\n", "\n", "So"], [".\n\nSo"]])
    async def test_a_separator_is_seen_however_tokens_cut_it(
        self, dialect: Dialect, halves: list[str]
    ) -> None:
        fake = FakeOpenAi(["Two", *halves, " on", END_TOKEN], dialect)
        async with generator(fake) as (engine, _):
            step = await write(engine, ASKED)
        assert step.text.rstrip(".") == "Two"
        assert step.stop_reason is StopReason.SEPARATOR

    async def test_the_models_own_end_is_the_end(self, dialect: Dialect) -> None:
        async with generator(FakeOpenAi(["Two", ".", END_TOKEN], dialect)) as (engine, _):
            step = await write(engine, ASKED)
        assert (step.text, step.stop_reason) == ("Two.", StopReason.END_OF_SEQUENCE)

    async def test_the_budget_cuts_a_step(self, dialect: Dialect) -> None:
        fake = FakeOpenAi(["a", "b", "c", "d", "e"], dialect)
        async with generator(fake) as (engine, _):
            step = await write(engine, StepRequest(Trajectory("1 + 1?"), max_tokens=4))
        assert (step.text, step.stop_reason) == ("abcd", StopReason.STEP_LENGTH)
        assert step.token_count == 4

    async def test_the_deltas_join_to_the_step(self, dialect: Dialect) -> None:
        asked = StepRequest(Trajectory("1 + 1?"), max_tokens=20, stream_text=True)
        async with generator(FakeOpenAi(TWO_STEPS, dialect)) as (engine, _):
            deltas, step = await watch(engine, asked)
        assert "".join(deltas) == step.text == "1 + 1 = 2."
        assert len(deltas) > 1

    async def test_blanks_before_a_step_are_skipped_and_paid_for(self, dialect: Dialect) -> None:
        first = "1 + 1?\n"
        fake = FakeOpenAi(["Two", "\n\n"], dialect)
        fake.by_prompt = {first: ["\n", "\n"]}
        if dialect.startswith("llama"):
            # Nothing stops it, so that it goes on by itself.
            fake.by_prompt = {first: ["\n", "\n", "Two", "\n\n"]}
        async with generator(fake) as (engine, _):
            step = await write(engine, ASKED)
        assert (step.text, step.stop_reason) == ("Two", StopReason.SEPARATOR)
        assert step.token_count == 4
        if not dialect.startswith("llama"):
            assert fake.bodies[-1]["prompt"] == "1 + 1?\n\n\n"
            assert fake.bodies[-1]["max_tokens"] == 18

    async def test_entropy_is_of_the_first_tokens(self, dialect: Dialect) -> None:
        asked = StepRequest(Trajectory("1 + 1?"), max_tokens=20, entropy_token_count=3)
        async with generator(FakeOpenAi(TWO_STEPS, dialect)) as (engine, _):
            step = await write(engine, asked)
        assert step.first_token_entropy == pytest.approx(0.6931, abs=1e-4)

    async def test_leaving_closes_the_connection(self, dialect: Dialect) -> None:
        fake = FakeOpenAi(TWO_STEPS, dialect, may_go_on=asyncio.Event())
        asked = StepRequest(Trajectory("1 + 1?"), max_tokens=20, stream_text=True)
        async with generator(fake) as (engine, server):
            async with aclosing(engine.generate_step(asked)) as items:
                assert await anext(items) == "1"
                assert engine.stats().running_requests == 1
            await until(lambda: server.gone_count == 1)
            assert engine.stats().running_requests == 0

    async def test_a_broken_stream_is_asked_for_once_more(self, dialect: Dialect) -> None:
        asked = StepRequest(Trajectory("1 + 1?"), max_tokens=20, stream_text=True)
        async with generator(FakeOpenAi(TWO_STEPS, dialect, broken_after=[2])) as (engine, _):
            deltas, step = await watch(engine, asked)
        assert "".join(deltas) == step.text == "1 + 1 = 2."
        assert step.token_count == 5

    async def test_a_stream_that_breaks_twice_is_unavailable(self, dialect: Dialect) -> None:
        async with generator(FakeOpenAi(TWO_STEPS, dialect, broken_after=[2, 2])) as (engine, _):
            with pytest.raises(TargetUnavailable, match="peer closed"):
                await write(engine, ASKED)


async def test_a_text_that_was_drawn_and_told_is_not_drawn_again() -> None:
    asked = StepRequest(Trajectory("?"), 20, Sampling(temperature=1.0), stream_text=True)
    async with generator(FakeOpenAi(TWO_STEPS, broken_after=[2])) as (engine, server):
        with pytest.raises(TargetUnavailable):
            await watch(engine, asked)
        assert sum(r.path == "/v1/completions" for r in server.requests) == 2  # with the trial


async def test_prompts_go_as_token_ids_where_the_server_takes_them(
    tokenizer: PieceTokenizer,
) -> None:
    asked = StepRequest(Trajectory("1?", (Step("Two", Source.DRAFT),)), max_tokens=20)
    for dialect in ("vllm", "llama"):
        fake = FakeOpenAi(TWO_STEPS, dialect)
        async with generator(fake, tokenizer=tokenizer) as (engine, _):
            step = await write(engine, asked)
        prompt = fake.bodies[-1]["prompt"]
        if dialect == "vllm":
            assert prompt[0] == 1
            assert tokenizer.decode(prompt) == "1?\nTwo\n\n"
            assert step.prefill_token_count == 7  # as its `usage` says
        else:
            assert prompt == "1?\nTwo\n\n"
            assert step.prefill_token_count == 1 + len("1?\nTwo") + 1


async def test_a_step_that_was_cut_is_gone_on_with() -> None:
    steps = (Step("1 +", Source.DRAFT, StopReason.STEP_LENGTH),)
    fake = FakeOpenAi([" 1", "\n\n"])
    async with generator(fake) as (engine, _):
        step = await write(engine, StepRequest(Trajectory("1?", steps), max_tokens=20))
    assert fake.bodies[-1]["prompt"] == "1?\n1 +"
    assert step.text == " 1"


async def test_a_server_that_names_stops_is_asked_to_stop() -> None:
    asked = {}
    for dialect in ("vllm", "llama"):
        fake = FakeOpenAi(TWO_STEPS, dialect)
        async with generator(fake) as (engine, _):
            await write(engine, ASKED)
        asked[dialect] = fake.bodies[-1].get("stop")
    assert asked == {"vllm": ["\n\n"], "llama": None}


async def test_what_is_drawn_depends_on_what_was_asked_for_alone() -> None:
    fake = FakeOpenAi(TWO_STEPS)
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=5)
    async with generator(fake) as (engine, _):
        for trajectory in (Trajectory("a"), Trajectory("b"), Trajectory("a").append(_STEP)):
            await write(engine, StepRequest(trajectory, 20, sampling))
    first, same, later = fake.bodies[-3:]
    assert first["seed"] == same["seed"] != later["seed"]
    assert 0 < first["seed"] < 2**31
    # A server's own defaults, which it has from the model's folder, must not add to it.
    assert (first["repetition_penalty"], first["repeat_penalty"], first["min_p"]) == (1, 1, 0)
    assert (first["temperature"], first["top_p"]) == (0.7, 0.9)
    assert first["top_k"] > 1_000_000


_STEP = Step("Two", Source.DRAFT)


async def test_a_server_without_logprobs_writes_steps_without_entropy() -> None:
    asked = StepRequest(Trajectory("1 + 1?"), max_tokens=20, entropy_token_count=3)
    async with generator(FakeOpenAi(TWO_STEPS, has_logprobs=False)) as (engine, _):
        step = await write(engine, asked)
    assert step.text == "1 + 1 = 2."
    assert step.first_token_entropy is None


async def test_the_time_limit_ends_a_step_with_what_it_has() -> None:
    fake = FakeOpenAi(["Tw", "o"], may_go_on=asyncio.Event())
    asked = StepRequest(Trajectory("?"), 20, stream_text=True, time_limit_s=0.3)
    async with generator(fake) as (engine, server):
        deltas, step = await watch(engine, asked)
        await until(lambda: server.gone_count == 1)
    assert (deltas, step.text) == (["Tw"], "Tw")
    assert (step.stop_reason, step.token_count) == (StopReason.DEADLINE, 1)


async def test_a_cut_step_ends_before_half_a_character() -> None:
    # A server that decodes token by token writes U+FFFD until the character is whole.
    async with generator(FakeOpenAi(["5 ", "\ufffd", "x"])) as (engine, _):
        step = await write(engine, StepRequest(Trajectory("?"), max_tokens=2))
    assert (step.text, step.stop_reason) == ("5 ", StopReason.STEP_LENGTH)


async def test_characters_outside_ascii_arrive_whole() -> None:
    async with generator(FakeOpenAi(["8 €", " →", " 😀", "\n\n"])) as (engine, _):
        assert (await write(engine, ASKED)).text == "8 € → 😀"


async def test_many_calls_run_at_once_and_one_too_many_is_refused() -> None:
    may_go_on = asyncio.Event()
    fake = FakeOpenAi(TWO_STEPS, may_go_on=may_go_on)
    async with generator(fake) as (engine, _), asyncio.TaskGroup() as group:
        calls = [group.create_task(write(engine, ASKED)) for _ in range(8)]
        await until(lambda: len(fake.bodies) == 9)
        with pytest.raises(Overloaded, match="ARBITRAGE_MAX_BATCH"):
            await write(engine, ASKED)
        may_go_on.set()
        steps = [await call for call in calls]
    assert {step.text for step in steps} == {"1 + 1 = 2."}


async def test_a_closing_engine_ends_what_is_under_way_and_takes_no_more() -> None:
    fake = FakeOpenAi(TWO_STEPS, may_go_on=asyncio.Event())
    asked = StepRequest(Trajectory("1 + 1?"), max_tokens=20, stream_text=True)
    async with generator(fake) as (engine, server):
        items = engine.generate_step(asked)
        assert await anext(items) == "1"
        await engine.close()
        with pytest.raises(NotServing):
            await anext(items)
        with pytest.raises(NotServing):
            await write(engine, ASKED)
        await until(lambda: server.gone_count == 1)


async def test_what_does_not_fit_the_context_is_not_sent(tokenizer: PieceTokenizer) -> None:
    fake = FakeOpenAi(TWO_STEPS, model_entry={"id": "smol", "max_model_len": 50})
    async with generator(fake, tokenizer=tokenizer) as (engine, _):
        asked_count = len(fake.bodies)
        with pytest.raises(ContextTooLong, match="51 tokens with its steps"):
            await write(engine, StepRequest(Trajectory("x" * 49), max_tokens=1))
        assert len(fake.bodies) == asked_count
        assert (await write(engine, StepRequest(Trajectory("x" * 47), max_tokens=1))).text == "1"


class Failing:
    """A server that describes itself and takes the trial, and then does what a test wants."""

    def __init__(self, fail: Handler) -> None:
        self._fail = fail
        self._good = FakeOpenAi(TWO_STEPS)
        self.fail_count = 0

    async def __call__(self, request: HttpRequest, reply: HttpReply) -> None:
        if request.method == "GET" or request.json["max_tokens"] == 2:
            await self._good(request, reply)
        else:
            self.fail_count += 1
            await self._fail(request, reply)


async def failure(fail: Handler, **options: Any) -> ArbitrageError:
    """Returns the error a step ends with."""
    async with generator(Failing(fail), **options) as (engine, _):
        with pytest.raises(ArbitrageError) as caught:
            await write(engine, ASKED)
        assert engine.stats().running_requests == 0
    return caught.value


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (400, {"error": {"message": "bad stop"}}, Internal, "answered 400: bad stop"),
        (401, {"error": "who are you"}, TargetUnavailable, "who are you; give it an API key"),
        (403, {"detail": "no"}, TargetUnavailable, "give it an API key"),
        (404, {"message": "no such model"}, TargetUnavailable, "answered 404: no such model"),
        (422, {"detail": [{"msg": "x"}]}, Internal, r"answered 422: .*msg"),
        (424, {"error": "failed"}, TargetUnavailable, "answered 424: failed"),
        (429, {"error": "queue full"}, Overloaded, "answered 429: queue full"),
        (500, "<html>oops</html>", TargetUnavailable, "answered 500: <html>oops"),
        (503, "", TargetUnavailable, "answered 503: nothing more"),
        (302, "", TargetUnavailable, "answered 302"),
        (400, {"message": "maximum context length is 9"}, ContextTooLong, "does not fit"),
    ],
)
async def test_a_status_that_says_no_is_an_error_of_ours(
    status: int,
    body: object,
    kind: type[ArbitrageError],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = await failure(lambda _, reply: reply.answer(status, body))
    assert isinstance(error, kind)
    assert re.search(said, str(error))
    is_failure = kind not in (ContextTooLong, Overloaded)
    assert (f", status {status};" in caplog.text) == is_failure
    assert "oops" not in caplog.text


@pytest.mark.parametrize(
    ("given", "expected_s"), [("7", 7.0), ("0.5", 0.5), ("Wed, 21 Oct", 1.0), ("9e9", 600.0)]
)
async def test_a_full_server_says_when_to_come_back(given: str, expected_s: float) -> None:
    error = await failure(lambda _, reply: reply.answer(429, {}, Retry_After=given))
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == expected_s


async def test_a_server_that_falls_silent_is_given_up_and_not_asked_again() -> None:
    async def hang(_: HttpRequest, reply: HttpReply) -> None:
        await reply.begin()
        await reply.event({"choices": [{"index": 0, "text": "1"}]})
        await asyncio.Event().wait()

    failing = Failing(hang)
    async with generator(failing, silence_timeout_s=0.2) as (engine, server):
        with pytest.raises(TargetUnavailable, match=r"was silent for 0\.2 s"):
            await write(engine, ASKED)
        await until(lambda: server.gone_count == 1)
    assert failing.fail_count == 1


def streaming(*parts: bytes, ends: bool = True) -> Handler:
    """Returns a handler that sends these bytes."""

    async def stream(_: HttpRequest, reply: HttpReply) -> None:
        await reply.begin()
        for part in parts:
            await reply.send(part)
        if ends:
            await reply.end()
        else:
            await reply.break_off()

    return stream


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (streaming(b'data: {"choices": [{"text": "5 \xe2\x82"}]}\n\n'), "not UTF-8"),
        (streaming(b'data: {"choices": [{"text": "5 \xe2\x82'), "not UTF-8"),
        (streaming(b'data: {"choices": [{"text": "5 \\ud83d"}]}\n\n'), "half a character"),
        (
            streaming(*[b'data: {"choices": [{"text": "a"}]}\n\n'] * 40),
            "20 tokens, and does not stop",
        ),
        (
            streaming(b'data: {"choices": [{"logprobs": {"top_logprobs": [{"a": NaN}]}}]}\n\n'),
            "is not a number",
        ),
        (streaming(b"data: {oops\n\n"), "sent what is not JSON: '{oops'"),
        (streaming(b"data: [1]\n\n"), "cannot be read"),
        (streaming(b'data: {"choices": [{"text": 5}]}\n\n'), "choices.0.text"),
        (streaming(b'data: {"usage": {"prompt_tokens": -1}}\n\n'), "usage.prompt_tokens"),
        (streaming(b'data: {"error": {"message": "out of memory"}}\n\n'), "out of memory"),
        (streaming(b"data: [DONE]\n\n"), "without a finish_reason"),
        (streaming(b'data: {"choices": []}\n\n'), "before its last event"),
        (streaming(b'data: {"choi', ends=False), "peer closed"),
        (
            streaming(b'data: {"choices": [{"finish_reason": "abort"}]}\n\ndata: [DONE]\n\n'),
            "abort",
        ),
        (lambda _, reply: reply.answer(200, {"choices": []}), "text/event-stream"),
    ],
)
async def test_a_stream_that_makes_no_sense_is_unavailable(
    handler: Handler, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = await failure(handler)
    # Logs hold no text of problems or steps, and this may be some.
    assert "the model's server failed: " in caplog.text
    assert "oops" not in caplog.text
    assert "out of memory" not in caplog.text
    assert isinstance(error, TargetUnavailable)
    assert said in str(error)
    assert "http://127.0.0.1" in str(error)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_one_connection_serves_step_after_step(dialect: Dialect) -> None:
    async with generator(FakeOpenAi(TWO_STEPS, dialect)) as (engine, server):
        for _ in range(3):
            await write(engine, ASKED)
    assert len(server.requests) > 3
    assert server.connection_count == 1


async def test_a_server_that_stays_after_its_last_event_is_left() -> None:
    async def stay(_: HttpRequest, reply: HttpReply) -> None:
        await reply.begin()
        await reply.event({"choices": [{"text": "Two", "finish_reason": "length"}]})
        await reply.event("[DONE]")
        await asyncio.Event().wait()

    async with generator(Failing(stay), silence_timeout_s=3600.0) as (engine, server):
        async with asyncio.timeout(60.0):
            step = await write(engine, ASKED)
        await until(lambda: server.gone_count == 1)
    assert (step.text, step.stop_reason) == ("Two", StopReason.STEP_LENGTH)


async def test_a_character_in_two_chunks_is_whole() -> None:
    euro = "€".encode()
    handler = streaming(
        b'data: {"choices": [{"text": "5 ' + euro[:1],
        euro[1:] + b'", "finish_reason": "stop", "stop_reason": "\\n\\n"}]}\n\ndata: [DO',
        b"NE]\n\n",
    )
    async with generator(Failing(handler)) as (engine, _):
        step = await write(engine, ASKED)
    assert (step.text, step.stop_reason) == ("5 €", StopReason.SEPARATOR)
    assert step.token_count == 1  # no usage: what was seen


async def test_the_key_and_the_ca_open_a_server(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    files = authority.server()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    assert files.certificate is not None
    tls.load_cert_chain(files.certificate, files.key)
    fake = FakeOpenAi(TWO_STEPS)

    async def guarded(request: HttpRequest, reply: HttpReply) -> None:
        if request.headers.get("authorization") == "Bearer sesame":
            await fake(request, reply)
        else:
            await reply.answer(401, {"error": "no key"})

    async with http_server(guarded, tls) as server:
        engine = await connected(server.url, api_key="sesame", ca=authority.path)
        assert (await write(engine, ASKED)).text == "1 + 1 = 2."
        await engine.close()
        for options, said in (
            ({"api_key": "sesame", "ca": stranger.path}, "certificate"),
            ({"api_key": "wrong", "ca": authority.path}, "401: no key"),
        ):
            with pytest.raises(Exception, match=said):
                await connected(server.url, **options)
