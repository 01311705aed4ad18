"""PRM and router by the Open Inference Protocol: the same bytes as by our own, both ways."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import numpy as np
import pytest
from kserve import InferenceGRPCClient
from pydantic import ValidationError

from arbitrage.core.errors import (
    ContextTooLong,
    FieldInvalid,
    Overloaded,
    PrmUnavailable,
)
from arbitrage.core.steps import Source, Step, Trajectory
from services.engines.oip_judges import OipPrm, OipRouter
from services.engines.oip_rows import PRM_INPUTS, ROUTER_INPUTS, request_of, steps_to_json
from services.engines.oip_server import OipServer
from services.engines.router_format import read_router_format
from services.prm.__main__ import build as build_prm
from services.prm.predictor import predictor
from services.prm.settings import PrmSettings
from services.router.__main__ import build as build_router
from services.router.settings import RouterSettings
from services.rpc.clients import GrpcRouter, GrpcScorer
from services.rpc.pool import opened_pool
from services.rpc.program import StartError
from services.rpc.telemetry import Telemetry
from tests.services.fakes_engines import FakePrmEngine
from tests.services.redis_servers import free_port
from tests.services.running import PRM, ROUTER, serving

PROBLEM = "Ann owns 14. Bob has 8 more than Ann. How many pens does Bob have?"
STEPS = (
    Step("Ann owns 14.", Source.DRAFT),
    Step("14 + 8 = 22, so Bob has €22.", Source.TARGET),
    Step("The answer is \\boxed{22}.", Source.DRAFT),
)
ROUTER_JSON = "model_packs/tiny/router/router.json"


def prm_settings(**fields: Any) -> PrmSettings:
    """Returns settings with defaults for the rest."""
    return PrmSettings(**fields)


def router_settings(**fields: Any) -> RouterSettings:
    """Returns settings with defaults for the rest."""
    return RouterSettings(**fields)


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Sends JSON and returns what comes back."""
    request = Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urlopen(request, timeout=30) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def body_of(names: tuple[str, ...], *rows: tuple[str, ...]) -> dict[str, Any]:
    """Returns a request of the protocol as REST has it."""
    columns = zip(*rows, strict=True)
    return {
        "inputs": [
            {"name": name, "shape": [len(rows)], "datatype": "BYTES", "data": list(column)}
            for name, column in zip(names, columns, strict=True)
        ]
    }


def output(answer: dict[str, Any], name: str) -> list[Any]:
    (found,) = [o["data"] for o in answer["outputs"] if o["name"] == name]
    assert isinstance(found, list)
    return found


@asynccontextmanager
async def client_at(port: int) -> AsyncIterator[InferenceGRPCClient]:
    client = InferenceGRPCClient(f"127.0.0.1:{port}", retries=2)
    try:
        yield client
    finally:
        await client.close()


def float_bytes(values: Any) -> bytes:
    return np.array(values, np.float32).tobytes()


@pytest.mark.slow
async def test_prm_and_router_score_the_same_bytes_by_every_protocol() -> None:
    http, rpc = free_port(), free_port()
    settings = prm_settings(model="tiny", kserve_http_port=http, kserve_grpc_port=rpc)
    # One step a call, and each asked once before: what runs together, or on more that is known of
    # a prefix, may be rounded otherwise in the last bit.
    rows = [(PROBLEM, steps_to_json(STEPS[: n + 1])) for n in range(len(STEPS))]
    async with AsyncExitStack() as stack:
        servicer = await stack.enter_async_context(build_prm(settings, Telemetry()))
        server = await stack.enter_async_context(serving(PRM, servicer))
        scorer = GrpcScorer(await stack.enter_async_context(opened_pool("prm", server.address)))
        client = await stack.enter_async_context(client_at(rpc))
        for number, row in enumerate(rows):
            before, text = Trajectory(PROBLEM, STEPS[:number]), STEPS[number].text
            await scorer.score_step(before, text)
            ours = await scorer.score_step(before, text)
            rest = await asyncio.to_thread(
                post, http, "/v2/models/prm/infer", body_of(PRM_INPUTS, row)
            )
            grpc_answer = await client.infer(request_of("prm", PRM_INPUTS, [row]))
            expected = float_bytes([ours.value])
            assert float_bytes(output(rest, "score")) == expected
            by_grpc = {o.name: o.as_numpy() for o in grpc_answer.outputs}
            assert float_bytes(by_grpc["score"]) == expected
            assert output(rest, "revision") == [ours.model.revision]
            assert by_grpc["revision"].tolist() == [ours.model.revision.encode()]

    settings_r = router_settings(model="tiny", kserve_http_port=http, kserve_grpc_port=rpc)
    async with AsyncExitStack() as stack:
        servicer_r = await stack.enter_async_context(build_router(settings_r, Telemetry()))
        server = await stack.enter_async_context(serving(ROUTER, servicer_r))
        pool = await stack.enter_async_context(opened_pool("router", server.address))
        router = GrpcRouter(pool)
        client = await stack.enter_async_context(client_at(rpc))
        for number, step in enumerate(STEPS):
            before = Trajectory(PROBLEM, STEPS[:number])
            await router.estimate_advantage(before, step.text, None)
            judged = await router.estimate_advantage(before, step.text, None)
            row_r = (PROBLEM, steps_to_json(STEPS[:number]), step.text)
            rest = await asyncio.to_thread(
                post, http, "/v2/models/router/infer", body_of(ROUTER_INPUTS, row_r)
            )
            grpc_answer = await client.infer(request_of("router", ROUTER_INPUTS, [row_r]))
            expected = float_bytes([judged.value])
            assert float_bytes(output(rest, "score")) == expected
            by_grpc = {o.name: o.as_numpy() for o in grpc_answer.outputs}
            assert float_bytes(by_grpc["score"]) == expected


@pytest.mark.slow
async def test_a_judge_behind_a_predictor_scores_as_it_does_by_itself() -> None:
    rpc = free_port()
    there = prm_settings(model="tiny", kserve_grpc_port=rpc)
    here = prm_settings(model="prm", engine="oip", engine_url=f"127.0.0.1:{rpc}")
    async with build_prm(there, Telemetry()) as original, build_prm(here, Telemetry()) as remote:
        known = await original._engine.score_steps(PROBLEM, STEPS, 1)
        found = await remote._engine.score_steps(PROBLEM, STEPS, 1)
        # Batched rows may be rounded otherwise.
        assert found.values == pytest.approx(known.values, abs=1e-6)
        assert found.model.revision == known.model.revision
        assert found.model.model_id == "prm"
    there_r = router_settings(model="tiny", kserve_grpc_port=rpc)
    here_r = router_settings(
        model="router",
        engine="oip",
        engine_url=f"127.0.0.1:{rpc}",
        engine_router_json=ROUTER_JSON,
    )
    async with (
        build_router(there_r, Telemetry()) as original_r,
        build_router(here_r, Telemetry()) as remote_r,
    ):
        trajectory = Trajectory(PROBLEM, STEPS[:2])
        await original_r._engine.estimate_advantage(trajectory, STEPS[2].text)
        known_r = await original_r._engine.estimate_advantage(trajectory, STEPS[2].text)
        found_r = await remote_r._engine.estimate_advantage(trajectory, STEPS[2].text)
        assert float_bytes([found_r.score.value]) == float_bytes([known_r.score.value])
        described = remote_r._engine.description
        assert described == replace(original_r._engine.description, model=described.model)


Served = Callable[..., Awaitable[tuple[FakePrmEngine, int, int]]]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """Serves a PRM without weights by both protocols, and returns it with the ports."""
    async with AsyncExitStack() as stack:

        async def serve(**settings: Any) -> tuple[FakePrmEngine, int, int]:
            engine, http, rpc = FakePrmEngine(), free_port(), free_port()
            told = prm_settings(model="m", kserve_http_port=http, kserve_grpc_port=rpc, **settings)
            await stack.enter_async_context(predictor(told, engine))
            return engine, http, rpc

        yield serve


async def refusal(port: int, body: dict[str, Any]) -> tuple[int, str]:
    """Returns the status and the words that a request is refused with."""

    def ask() -> tuple[int, str]:
        with pytest.raises(HTTPError) as raised:
            post(port, "/v2/models/prm/infer", body)
        return raised.value.code, raised.value.read().decode()

    return await asyncio.to_thread(ask)


def changed(**fields: Any) -> dict[str, Any]:
    """Returns a good request whose `steps` are otherwise."""
    body = body_of(PRM_INPUTS, ("p", '["a"]'))
    body["inputs"][1] |= fields
    return body


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (body_of(("problem",), ("p",)), "steps: is missing; send problem, steps"),
        (body_of((*PRM_INPUTS, "more"), ("p", "[]", "x")), "more: no such input"),
        (changed(datatype="INT64", data=[1]), "steps: expected BYTES of shape [n], got INT64"),
        (changed(shape=[1, 1]), "steps: expected BYTES of shape [n], got BYTES of [1, 1]"),
        (changed(data=["[]", "[]"]), "steps: has another number of values than the 1 of its"),
        (changed(data=[5]), "steps[0]: expected a text, got 5"),
        (changed(data=["no json"]), "steps[0]: is no JSON"),
        (changed(data=["{}"]), "steps[0]: expected an array of steps"),
        (changed(data=["[1]"]), "steps[0][0]: expected a text"),
        (changed(data=['["\\ud83d"]']), "steps[0][0]: has half a character"),
        (changed(data=['[{"text": "a", "source": "me"}]']), "source: expected draft or target"),
        (changed(data=["[]"]), "steps[0]: is empty"),
        (changed(data=['["a"]', '["b"]'], shape=[2]), "all inputs have the same length n"),
        (body_of(PRM_INPUTS, *[("p", '["a"]')] * 3), "expected 1 to 2 rows, got 3"),
    ],
)
async def test_a_request_that_is_none_is_refused_with_tensor_value_and_fix(
    served: Served, body: dict[str, Any], said: str
) -> None:
    _, http, _ = await served(kserve_max_rows=2)
    code, words = await refusal(http, body)
    assert code == 400
    assert said in json.loads(words)["error"]


async def test_what_the_engine_refuses_is_told_by_both_protocols(served: Served) -> None:
    engine, http, rpc = await served()
    body = body_of(PRM_INPUTS, ("p", '["a"]'))
    async with client_at(rpc) as client:
        for error, code, status in (
            (ContextTooLong("steps", "9", "is long", "cut"), 400, grpc.StatusCode.INVALID_ARGUMENT),
            (Overloaded("the queue is full"), 503, grpc.StatusCode.UNAVAILABLE),
        ):
            engine.error = error
            found, words = await refusal(http, body)
            assert (found, str(error) in words) == (code, True)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await client.infer(request_of("prm", PRM_INPUTS, [("p", '["a"]')]))
            assert raised.value.code() is status
            assert str(error) in str(raised.value.details())


async def test_rows_of_one_request_run_together(served: Served) -> None:
    engine, http, _ = await served()
    engine.may_answer.clear()
    rows = [("p", '["a"]')] * 5
    asking = asyncio.create_task(
        asyncio.to_thread(post, http, "/v2/models/prm/infer", body_of(PRM_INPUTS, *rows))
    )
    async with asyncio.timeout(20):
        while engine.call_count < len(rows):  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.005)
    engine.may_answer.set()
    assert output(await asking, "score") == pytest.approx([0.9] * 5)


async def test_the_protocol_tells_readiness_and_tensors(served: Served) -> None:
    _, http, rpc = await served(kserve_model="skywork-1.5b")

    def get(path: str) -> Any:
        with urlopen(f"http://127.0.0.1:{http}{path}", timeout=30) as answer:
            return json.loads(answer.read())

    assert (await asyncio.to_thread(get, "/v2/health/ready"))["ready"] is True
    known = await asyncio.to_thread(get, "/v2/models/skywork-1.5b")
    assert [tensor["name"] for tensor in known["inputs"]] == list(PRM_INPUTS)
    assert known["outputs"][0]["name"] == "score"
    async with client_at(rpc) as client:
        assert await client.is_model_ready("skywork-1.5b")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.is_model_ready("other")
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_server_that_is_away_refuses_or_hangs_is_told_apart(served: Served) -> None:
    engine, _, rpc = await served()
    away = OipPrm(OipServer(f"127.0.0.1:{free_port()}", "prm", 5.0))
    prm = OipPrm(OipServer(f"127.0.0.1:{rpc}", "prm", 5.0))
    hasty = OipPrm(OipServer(f"127.0.0.1:{rpc}", "prm", 0.2))
    elsewhere = OipRouter(
        OipServer(f"127.0.0.1:{rpc}", "prm", 5.0),
        await asyncio.to_thread(read_router_format, Path(ROUTER_JSON)),
    )
    try:
        with pytest.raises(PrmUnavailable, match="UNAVAILABLE"):
            await away.score_steps(PROBLEM, STEPS)
        engine.error = ContextTooLong("steps", "9", "is long", "cut")
        with pytest.raises(FieldInvalid, match="is long"):
            await prm.score_steps(PROBLEM, STEPS)
        engine.error = None
        assert (await prm.score_steps(PROBLEM, STEPS, 3)).values == ()
        assert len((await prm.score_steps(PROBLEM, STEPS, 1)).values) == 2
        # A PRM's rows are no router's.
        with pytest.raises(FieldInvalid, match="candidate: no such input"):
            await elsewhere.estimate_advantage(Trajectory(PROBLEM), "a")
        engine.may_answer.clear()
        # Its own time, not a caller's: the loop goes on without it.
        with pytest.raises(PrmUnavailable, match="DEADLINE_EXCEEDED"):
            await hasty.score_steps(PROBLEM, STEPS)
    finally:
        engine.may_answer.set()
        for judge in (away, prm, hasty, elsewhere):
            await judge.close()


async def test_a_program_does_not_start_without_its_server() -> None:
    settings = prm_settings(model="prm", engine="oip", engine_url=f"127.0.0.1:{free_port()}")
    with pytest.raises(StartError, match=r"ARBITRAGE_ENGINE_URL: .* the first call failed"):
        async with build_prm(settings, Telemetry()):
            pass


async def test_a_port_that_is_taken_is_named(served: Served) -> None:
    _, http, rpc = await served()
    for field, port in (("kserve_http_port", http), ("kserve_grpc_port", rpc)):
        taken: dict[str, Any] = {field: port}
        with pytest.raises(StartError, match=f"ARBITRAGE_{field.upper()}: cannot listen"):
            async with predictor(prm_settings(model="m", **taken), FakePrmEngine()):
                pass


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"engine": "oip"}, "ARBITRAGE_ENGINE_URL: is not set"),
        ({"engine_url": "a:1"}, "ARBITRAGE_ENGINE_URL: is set, but ARBITRAGE_ENGINE is trans"),
        (
            {"kserve_grpc_port": 1, "allowed_callers": ("a",), "tls_client_ca": "ca"},
            "callers must show a certificate",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        prm_settings(model="m", tls_certificate="c", tls_key="k", **fields)
    assert said in str(raised.value)


def test_a_router_elsewhere_is_described_by_its_checkpoint() -> None:
    with pytest.raises(ValidationError, match="ARBITRAGE_ENGINE_ROUTER_JSON: goes with"):
        router_settings(model="m", engine="oip", engine_url="a:1")
    with pytest.raises(ValidationError, match="ARBITRAGE_ENGINE_ROUTER_JSON: goes with"):
        router_settings(model="m", engine_router_json=ROUTER_JSON)
