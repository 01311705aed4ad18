"""The gateway, over real HTTP and real gRPC, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from arbitrage.v1 import orchestrator_pb2 as api
from arbitrage.v1 import trajectory_pb2
from services.gateway import server
from services.gateway.settings import GatewaySettings
from services.rpc import watched
from services.rpc.server import Listener, RpcServer
from services.rpc.telemetry import Telemetry
from services.rpc.tls import TlsFiles
from tests.services.certificates import SERVER_NAMES, Authority
from tests.services.running import ORCHESTRATOR, House, until
from tests.services.running_gateway import running_gateway
from tests.services.scripted_orchestrator import (
    SOLUTION,
    Refusal,
    ScriptedOrchestrator,
    Silence,
    draft_step,
    proposed,
    serving,
)
from tests.services.test_client_names import CallCounter

ASKED: dict[str, Any] = {"model": "arbitrage", "messages": [{"role": "user", "content": "14 + 8?"}]}
TEXT = "14 + 8 = 22.\n\nThe answer is \\boxed{22}."


@pytest.fixture
def orchestrator() -> Iterator[ScriptedOrchestrator]:
    with serving(ScriptedOrchestrator(SOLUTION)) as scripted:
        yield scripted


async def completed(client: AsyncOpenAI, **more: Any) -> ChatCompletion:
    """Returns the answer to a request that is not streamed."""
    answer = await client.chat.completions.create(**{**ASKED, **more})
    assert isinstance(answer, ChatCompletion)
    return answer


async def streamed(client: AsyncOpenAI, **more: Any) -> list[ChatCompletionChunk]:
    """Returns the chunks of a stream."""
    stream: Any = await client.chat.completions.create(**{**ASKED, "stream": True, **more})
    return [chunk async for chunk in stream]


async def test_openais_client_gets_the_solution(orchestrator: ScriptedOrchestrator) -> None:
    async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
        answer = await completed(client)
        await until(lambda: gateway.count("chat_completions", 200) == 1)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
    assert (choice.finish_reason, answer.model) == ("stop", "arbitrage")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.model_extra is not None
    told = answer.model_extra["arbitrage"]
    assert [step["source"] for step in told["steps"]] == ["draft", "target"]
    assert (told["escalation_rate"], told["discarded_tokens"]) == (0.5, 5)
    [request] = orchestrator.requests
    assert request.WhichOneof("policy") == "arbitrage"
    assert [message.content for message in request.chat.messages] == ["14 + 8?"]


async def test_a_stream_says_what_the_whole_answer_says(
    orchestrator: ScriptedOrchestrator,
) -> None:
    async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
        chunks = await streamed(client, stream_options={"include_usage": True})
    *steps, end, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in steps) == TEXT
    assert [chunk.choices[0].delta.role for chunk in (*steps, end)] == ["assistant", None, None]
    assert [chunk.choices[0].finish_reason for chunk in (*steps, end)] == [None, None, "stop"]
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_step_is_sent_when_it_is_committed() -> None:
    script = (proposed(0, "One."), draft_step(0, "One."), Silence())
    with serving(ScriptedOrchestrator(script)) as orchestrator:
        async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
            stream: Any = await client.chat.completions.create(**{**ASKED, "stream": True})
            first = await anext(aiter(stream))
            assert first.choices[0].delta.content == "One."
            assert not orchestrator.cancelled.is_set()
            await stream.close()
            await until(orchestrator.cancelled.is_set)
            await until(lambda: gateway.count("chat_completions", 499))


async def test_a_client_that_leaves_ends_the_work_for_it() -> None:
    with serving(ScriptedOrchestrator((Silence(),))) as orchestrator:
        async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
            asking = asyncio.create_task(completed(client))
            await until(lambda: orchestrator.requests)
            asking.cancel()
            assert await asyncio.to_thread(orchestrator.cancelled.wait, 60)
            await until(lambda: gateway.count("chat_completions", 499))
            assert gateway.count("chat_completions", 200) == 0


async def test_a_stream_with_nothing_to_say_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LONGEST_SILENCE_S", 0.05)
    script = (draft_step(0, "One."), Silence())
    with serving(ScriptedOrchestrator(script)) as orchestrator:
        async with (
            running_gateway(orchestrator.address) as gateway,
            httpx2.AsyncClient(base_url=gateway.url) as client,
            client.stream("POST", "/v1/chat/completions", json={**ASKED, "stream": True}) as answer,
        ):
            lines = []
            async for line in answer.aiter_lines():
                lines.append(line)
                if lines.count(": at work") == 2:
                    break
    assert "One." in "".join(lines)


async def test_every_field_arrives(orchestrator: ScriptedOrchestrator) -> None:
    own = {
        "target_share": 0.3,
        "max_steps": 7,
        "max_step_tokens": 50,
        "max_target_steps": 2,
        "time_limit_s": 9.5,
        "allow_degraded": True,
    }
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}],
        },
        {"role": "assistant", "content": "2", "tool_calls": None, "refusal": None},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
        await completed(
            client,
            messages=messages,
            max_completion_tokens=99,
            temperature=0.5,
            top_p=0.9,
            seed=3,
            n=1,
            user="somebody",
            extra_body={"arbitrage": own, "top_k": 20},
        )
    [request] = orchestrator.requests
    roles = [api.ChatRole.Name(message.role) for message in request.chat.messages]
    assert roles == ["CHAT_ROLE_SYSTEM", "CHAT_ROLE_USER", "CHAT_ROLE_ASSISTANT", "CHAT_ROLE_USER"]
    assert [m.content for m in request.chat.messages] == ["Be brief.", "1 + 1?", "2", "And 2 + 2?"]
    assert request.arbitrage.target_share == pytest.approx(0.3)
    budgets = request.budgets
    assert (budgets.max_tokens, budgets.max_steps, budgets.max_step_tokens) == (99, 7, 50)
    assert (budgets.max_target_steps, budgets.time_limit.ToMilliseconds()) == (2, 9500)
    assert request.allow_degraded
    assert request.sampling == trajectory_pb2.SamplingConfig(
        temperature=0.5, top_p=0.9, top_k=20, seed=3
    )


async def test_the_model_names_the_policy(orchestrator: ScriptedOrchestrator) -> None:
    own = {"threshold": 0.25, "seed": 4}
    async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
        await completed(client, model="random", extra_body={"arbitrage": own})
    [request] = orchestrator.requests
    assert request.random == api.RandomPolicy(escalation_rate=0.25, seed=4)


async def test_models_are_the_policies_that_are_offered(orchestrator: ScriptedOrchestrator) -> None:
    orchestrator.capabilities = api.GetCapabilitiesResponse(policies=["draft_only", "random"])
    async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
        assert [model.id async for model in client.models.list()] == ["draft_only", "random"]
        assert (await client.models.retrieve("random")).owned_by == "arbitrage"
        with pytest.raises(openai.NotFoundError, match="give one of draft_only, random"):
            await client.models.retrieve("arbitrage")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{", None, "is no JSON"),
        (b"[]", None, "must be a JSON object"),
        (b"[" * 100_000, None, "is no JSON"),
        ({}, "model", "Field required"),
        ({"model": "arbitrage"}, "messages", "Field required"),
        ({**ASKED, "messages": "hello"}, "messages", "valid list"),
        ({**ASKED, "messages": [{"role": "cook", "content": ""}]}, "messages.0.role", "is no role"),
        (
            {**ASKED, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "give text alone",
        ),
        (
            {**ASKED, "messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            "messages.0.tool_calls",
            "is not taken here",
        ),
        ({**ASKED, "temperature": "hot"}, "temperature", "valid number"),
        ({**ASKED, "max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({**ASKED, "max_tokens": 1 << 40}, "budgets.max_tokens", "must be an integer"),
        ({**ASKED, "n": 2}, "n", "not offered"),
        ({**ASKED, "reasoning_effort": "high"}, "reasoning_effort", "not offered"),
        ({**ASKED, "stop": ["x"]}, "stop", "leave it out"),
        ({**ASKED, "tools": [{"type": "function"}]}, "tools", "not offered"),
        ({**ASKED, "response_format": {"type": "json_object"}}, "response_format", "not offered"),
        ({**ASKED, "tempreature": 1}, "tempreature", "is not known here"),
        ({**ASKED, "arbitrage": {"treshold": 1}}, "arbitrage.treshold", "is not known here"),
        ({**ASKED, "arbitrage": {"seed": 1}}, "seed", "means nothing to arbitrage"),
        (json.dumps({**ASKED, "user\ud800": 1}).encode(), None, "user"),
        (
            json.dumps({**ASKED, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
            "chat.messages[0].content",
            "lone surrogate",
        ),
    ],
)
async def test_bad_input_names_the_field_and_reaches_nobody(
    orchestrator: ScriptedOrchestrator, body: Any, param: str | None, words: str
) -> None:
    async with running_gateway(orchestrator.address) as gateway:
        answer = await gateway.post(body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == (param or "body")
    assert words in error["message"]
    assert orchestrator.requests == []


async def test_an_unknown_model_is_not_found(orchestrator: ScriptedOrchestrator) -> None:
    async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
        with pytest.raises(
            openai.NotFoundError, match='there is no "gpt-4o"; give one of arbitrage'
        ):
            await completed(client, model="gpt-4o")


@pytest.mark.parametrize(
    ("code", "reason", "status", "kind"),
    [
        ("UNAUTHENTICATED", "UNAUTHENTICATED", 401, openai.AuthenticationError),
        ("PERMISSION_DENIED", "PERMISSION_DENIED", 403, openai.PermissionDeniedError),
        ("RESOURCE_EXHAUSTED", "OVERLOADED", 429, openai.RateLimitError),
        ("FAILED_PRECONDITION", "CALIBRATION_UNAVAILABLE", 400, openai.BadRequestError),
        ("INTERNAL", "INTERNAL", 500, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_what_the_orchestrator_refuses_has_a_status_of_its_own(
    code: str, reason: str, status: int, kind: type[openai.APIStatusError], is_stream: bool
) -> None:
    refusal = Refusal(grpc.StatusCode[code], "so it is", reason)
    with serving(ScriptedOrchestrator((refusal,))) as orchestrator:
        async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
            with pytest.raises(kind, match="so it is") as caught:
                await (streamed if is_stream else completed)(client)
    assert (caught.value.status_code, caught.value.code) == (status, reason.lower())
    assert ("retry-after" in caught.value.response.headers) == (status == 429)


async def test_a_stream_that_fails_ends_with_the_error() -> None:
    script = (
        draft_step(0, "One."),
        Refusal(grpc.StatusCode.INVALID_ARGUMENT, "it does not fit", "CONTEXT_TOO_LONG"),
    )
    with serving(ScriptedOrchestrator(script)) as orchestrator:
        async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
            with pytest.raises(openai.APIError, match="it does not fit"):
                await streamed(client)
            await until(lambda: gateway.count("chat_completions", 400) == 1)


async def test_a_stream_that_breaks_goes_on_after_the_steps_that_came() -> None:
    lost = Refusal(grpc.StatusCode.UNAVAILABLE, "the host is gone")
    with serving(ScriptedOrchestrator((*SOLUTION[:2], lost), SOLUTION[2:])) as orchestrator:
        async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
            chunks = await streamed(client)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    first, second = orchestrator.requests
    assert first.request_id == second.request_id
    assert second.resume_after_step == 1


async def test_nobody_there_is_503_and_what_else_there_is_has_its_status() -> None:
    async with running_gateway("127.0.0.1:1") as gateway:
        own = {"arbitrage": {"time_limit_s": 0.5}}
        answers = {
            "nobody": (await gateway.post({**ASKED, **own}, timeout=60)).status_code,
            "path": (await gateway.get("/v1/embeddings")).status_code,
            "method": (await gateway.get("/v1/chat/completions")).status_code,
            "health": (await gateway.get("/health")).status_code,
        }
        assert answers == {"nobody": 503, "path": 404, "method": 405, "health": 200}
        await until(lambda: gateway.count("other", 404) == 1)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("END_OF_SEQUENCE", "stop"), ("TOTAL_LENGTH", "length"), ("DEADLINE", "length")],
)
async def test_an_answer_that_a_limit_ended_says_so(reason: str, expected: str) -> None:
    end = api.GenerateSolutionResponse(finished=api.Finished(stop_reason=f"STOP_REASON_{reason}"))
    with serving(ScriptedOrchestrator((draft_step(0, "One."), end))) as orchestrator:
        async with running_gateway(orchestrator.address) as gateway, gateway.openai() as client:
            answer = await completed(client)
            chunks = await streamed(client)
    assert answer.choices[0].finish_reason == expected
    assert chunks[-1].choices[0].finish_reason == expected


async def test_a_client_that_reads_nothing_loses_its_place() -> None:
    script = [draft_step(index, "x" * (1 << 20)) for index in range(64)]
    with serving(ScriptedOrchestrator(script)) as orchestrator:
        async with running_gateway(orchestrator.address, write_timeout_s=0.2) as gateway:
            body = json.dumps({**ASKED, "stream": True}).encode()
            reader, writer = await asyncio.open_connection(*gateway.url[7:].split(":"), limit=1)
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}"
            writer.write(f"{head}\r\n\r\n".encode() + body)
            await until(lambda: gateway.count("chat_completions", 504))
            await until(orchestrator.cancelled.is_set)
            writer.close()
            assert not reader.at_eof()


async def test_a_body_that_never_ends_is_not_waited_for(
    orchestrator: ScriptedOrchestrator,
) -> None:
    async with running_gateway(orchestrator.address, write_timeout_s=0.2) as gateway:
        reader, writer = await asyncio.open_connection(*gateway.url[7:].split(":"))
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99"
        writer.write(f"{head}\r\n\r\n{{".encode())
        assert b" 408 " in await reader.readline()
        answer = await reader.read()
        # Or the connection would be the client's for as long as it sends a byte now and then.
        assert b"connection: close" in answer.lower()
        assert b"ARBITRAGE_WRITE_TIMEOUT_S" in answer
        writer.close()
        await writer.wait_closed()


async def test_an_upgrade_is_answered_as_the_request_that_it_is(
    orchestrator: ScriptedOrchestrator,
) -> None:
    upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    upgrade["sec-websocket-key"] = "MDEyMzQ1Njc4OTAxMjM0NQ=="
    async with running_gateway(orchestrator.address) as gateway, httpx2.AsyncClient() as client:
        answer = await client.get(f"{gateway.url}/v1/models", headers=upgrade)
    assert answer.status_code == 200


async def test_a_body_that_is_too_large_is_refused(orchestrator: ScriptedOrchestrator) -> None:
    large = {**ASKED, "messages": [{"role": "user", "content": "x" * (1 << 20)}]}
    async with running_gateway(orchestrator.address, max_message_mib=1) as gateway:
        answer = await gateway.post(large)
    assert answer.status_code == 413
    assert "ARBITRAGE_MAX_MESSAGE_MIB" in answer.json()["error"]["message"]


async def test_a_callers_key_is_the_orchestrators_to_judge(
    orchestrator: ScriptedOrchestrator,
) -> None:
    async with running_gateway(orchestrator.address) as gateway, gateway.openai("k1") as client:
        await completed(client)
        await gateway.post(ASKED)
        refused = await gateway.post(ASKED, headers={"authorization": "Basic abc"})
        odd = await gateway.post(ASKED, headers={"authorization": "Bearer a b"})
    keys = [value for key, value in orchestrator.metadata if key == "authorization"]
    assert keys == ["Bearer k1"]
    assert (refused.status_code, odd.status_code) == (401, 401)
    assert "a b" not in odd.text


async def test_a_key_that_may_not_travel_is_left_out(orchestrator: ScriptedOrchestrator) -> None:
    # This machine by a name that may be any machine's.
    elsewhere = orchestrator.address.replace("127.0.0.1", "0.0.0.0")
    for is_allowed, expected in ((False, []), (True, ["Bearer k1"])):
        async with (
            running_gateway(elsewhere, allow_plaintext_keys=is_allowed) as gateway,
            gateway.openai("k1") as client,
        ):
            assert (await completed(client)).choices
        keys = [value for key, value in orchestrator.metadata if key == "authorization"]
        assert keys == expected


@pytest.mark.parametrize(
    ("settings", "is_passed_on"),
    [
        ({"orchestrator_address": "127.0.0.1:1"}, True),
        ({"orchestrator_address": "10.0.0.1:1"}, False),
        ({"orchestrator_address": "127.0.0.1:1,10.0.0.1:1"}, False),
        ({"orchestrator_address": "10.0.0.1:1", "allow_plaintext_keys": True}, True),
        ({"orchestrator_address": "10.0.0.1:1", "orchestrator_tls_ca": "ca.pem"}, True),
    ],
)
def test_keys_do_not_travel_in_plaintext_unless_told_to(
    settings: dict[str, Any], is_passed_on: bool
) -> None:
    assert GatewaySettings(**settings).passes_keys_on == is_passed_on


async def test_a_request_past_the_grace_is_told_so(orchestrator: ScriptedOrchestrator) -> None:
    script = (draft_step(0, "One."), Silence())
    with serving(ScriptedOrchestrator(script)) as silent:
        async with running_gateway(silent.address) as gateway, gateway.openai() as client:
            asking = asyncio.create_task(streamed(client))
            await until(lambda: silent.requests)
            await gateway.server.drain(0.1)
            with pytest.raises(openai.APIError, match="the server stopped before the call ended"):
                await asking
            assert (await gateway.get("/health")).status_code == 503
            refused = await gateway.post(ASKED)
            assert refused.status_code == 503
            # The next request is to find another gateway, not this one's open connection.
            assert refused.headers["connection"] == "close"
        assert silent.cancelled.wait(10)


async def test_a_whole_house_answers_over_http() -> None:
    house = House()
    async with house.open(), running_gateway(house.address) as gateway, gateway.openai() as client:
        answer = await completed(client, model="target_only")
        chunks = await streamed(client, model="draft_only")
        models = {model.id async for model in client.models.list()}
    assert answer.choices[0].message.content is not None
    assert answer.choices[0].message.content.startswith("target")
    assert chunks[0].choices[0].delta.content is not None
    assert "arbitrage" in models


async def test_tls_on_both_sides_and_a_renewed_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "LOOK_INTERVAL_S", 0.05)
    authority = await asyncio.to_thread(Authority, tmp_path)
    certificate, key = await asyncio.to_thread(authority.issue, "server", *SERVER_NAMES)
    trusting = await asyncio.to_thread(ssl.create_default_context, cafile=str(authority.path))
    house = House(tls=TlsFiles(None, certificate, key))
    async with (
        house.open(),
        running_gateway(
            house.address,
            orchestrator_tls_ca=authority.path,
            tls_certificate=certificate,
            tls_key=key,
        ) as gateway,
    ):
        port = int(gateway.url.rpartition(":")[2])
        async with httpx2.AsyncClient(verify=trusting) as client:
            body = {**ASKED, "model": "draft_only"}
            answer = await client.post(f"https://127.0.0.1:{port}/v1/chat/completions", json=body)
            assert answer.status_code == 200
        before = await shown_certificate(port)
        await asyncio.to_thread(authority.issue, "server", *SERVER_NAMES)
        async with asyncio.timeout(30):
            while await shown_certificate(port) == before:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.05)


async def test_orchestrators_that_another_authority_vouches_for_are_believed_once_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "LOOK_INTERVAL_S", 0.05)
    servicer, port = CallCounter(), 0

    @asynccontextmanager
    async def orchestrator_of_a_new_authority() -> AsyncIterator[RpcServer]:
        # Under the same names of files each time.
        authority = await asyncio.to_thread(Authority, tmp_path)
        files = await asyncio.to_thread(authority.server)
        server = RpcServer(ORCHESTRATOR, Listener("127.0.0.1", port, tls=files), Telemetry())
        await server.start()
        await server.open(servicer)
        yield server
        await server.stop()

    async with AsyncExitStack() as stack:
        async with orchestrator_of_a_new_authority() as first:
            port = first.port
            gateway = await stack.enter_async_context(
                running_gateway(first.address, orchestrator_tls_ca=tmp_path / "ca.pem")
            )
            assert (await gateway.get("/v1/models")).status_code == 200
        async with orchestrator_of_a_new_authority(), asyncio.timeout(60):
            while (await gateway.get("/v1/models")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert servicer.count == 2


async def test_a_client_without_the_certificate_that_is_asked_for_gets_no_answer(
    tmp_path: Path, orchestrator: ScriptedOrchestrator
) -> None:
    authority = await asyncio.to_thread(Authority, tmp_path)
    certificate, key = await asyncio.to_thread(authority.issue, "server", *SERVER_NAMES)
    mine = await asyncio.to_thread(authority.issue, "mine", "client.example")
    trusting = await asyncio.to_thread(ssl.create_default_context, cafile=str(authority.path))
    async with running_gateway(
        orchestrator.address,
        tls_certificate=certificate,
        tls_key=key,
        tls_client_ca=authority.path,
    ) as gateway:
        url = gateway.url.replace("http://", "https://")
        async with httpx2.AsyncClient(verify=trusting, base_url=url) as client:
            with pytest.raises(httpx2.TransportError):
                await client.get("/health")
        await asyncio.to_thread(trusting.load_cert_chain, *mine)
        async with httpx2.AsyncClient(verify=trusting, base_url=url) as client:
            assert (await client.get("/health")).json() == {"serving": True}


async def shown_certificate(port: int) -> bytes | None:
    """Returns the certificate that a caller is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    shown: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    return shown
