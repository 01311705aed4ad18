"""Every rpc of the four services, over real gRPC, asked with bytes of every kind.

Whatever arrives is served, or refused as the caller's mistake by field, value and fix: a status
that blames the server is a finding.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.descriptor import FieldDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from arbitrage.core.errors import InvalidRequest
from arbitrage.core.events import Finished
from arbitrage.policy_specs import (
    Arbitrage,
    DraftOnly,
    FirstTokenEntropy,
    Oracle,
    Random,
    Rsd,
    TargetOnly,
)
from arbitrage.request import BudgetSpec, build_request
from arbitrage.status import CODES, from_rpc_error
from arbitrage.v1 import generator_pb2, orchestrator_pb2, prm_pb2, router_pb2, trajectory_pb2
from arbitrage.wire import capabilities_from_proto, event_from_proto
from services.engines.base import GeneratorEngine, PrmEngine, RouterEngine
from services.engines.loading import ModelKind, load_model
from services.engines.packs import find_pack
from services.engines.transformers_generator import TransformersGenerator
from services.engines.transformers_scorers import TransformersPrm, TransformersRouter
from services.generator.servicer import GeneratorServicer
from services.orchestrator.__main__ import build
from services.orchestrator.settings import OrchestratorSettings
from services.prm.servicer import PrmServicer
from services.router.servicer import RouterServicer
from services.rpc.convert import advantage_from_proto, generated_step_from_proto, router_from_proto
from services.rpc.telemetry import Telemetry
from tests.load.driver import ACCEPTED, LONGEST_S, Boundary, Wrong, legible
from tests.load.odd_values import OddValues
from tests.services.running import GENERATOR, ORCHESTRATOR, PRM, ROUTER, House, serving

_TOO_LARGE = b"\x0a\x80\x80\x80\x09" + bytes(9 << 21)  # one string of 18 MiB
_REFUSALS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
# The shipped models write some hundred tokens a second.
_SMALL: dict[str, Any] = {
    "default_steps": 3,
    "default_step_tokens": 32,
    "default_tokens": 128,
    "max_steps": 8,
    "max_step_tokens": 64,
    "max_tokens": 256,
}
_STEP = trajectory_pb2.Step(
    text="first, 1 + 1 = 2",
    source=trajectory_pb2.SOURCE_DRAFT,
    stop_reason=trajectory_pb2.STOP_REASON_SEPARATOR,
)
_SAMPLING = trajectory_pb2.SamplingConfig(temperature=0.7, top_p=0.9, top_k=3, seed=1)


@dataclass(frozen=True, slots=True)
class Rpc:
    """One rpc: good requests for it, and what holds for what it answers."""

    service: ServiceDescriptor
    method: str
    role: str
    weight: float
    good: Sequence[Message]
    check: Callable[[Any, list[Any]], object]


def _is_solution(request: Message, answers: list[Any]) -> None:
    ends = [isinstance(event_from_proto(answer), Finished) for answer in answers]
    if ends.count(True) != 1 or not ends[-1]:
        raise Wrong(f"a stream of {len(ends)} events does not end with its one `finished`")


def _is_step(request: Message, answers: list[Any]) -> None:
    kinds = [answer.WhichOneof("event") for answer in answers]
    if kinds.count("result") != 1 or kinds[-1] != "result":
        raise Wrong(f"a stream of {len(kinds)} messages does not end with its one result")
    generated_step_from_proto(answers[-1].result)


def _is_scores(request: prm_pb2.ScoreStepsRequest, answers: list[Any]) -> None:
    asked_count = len(request.steps) - request.skip_count
    scores = answers[0].scores
    if len(scores) != asked_count or not all(0.0 <= score <= 1.0 for score in scores):
        raise Wrong(f"{asked_count} scores were asked for, got {list(scores)}")


_GOOD_SOLUTIONS = [
    orchestrator_pb2.GenerateSolutionRequest(
        chat=orchestrator_pb2.Chat(
            messages=[
                orchestrator_pb2.ChatMessage(role=orchestrator_pb2.CHAT_ROLE_USER, content="1 + 1?")
            ]
        ),
        arbitrage=orchestrator_pb2.ArbitragePolicy(target_share=0.3),
        sampling=_SAMPLING,
        budgets=orchestrator_pb2.Budgets(max_steps=2, max_tokens=99, max_target_steps=1),
        allow_degraded=True,
        stream_text=True,
    ),
    *(
        build_request("1 + 1?", policy, budgets=BudgetSpec(max_steps=3))
        for policy in (
            Arbitrage(),
            Rsd(0.5),
            Oracle(),
            Random(0.5, seed=3),
            DraftOnly(),
            TargetOnly(),
            FirstTokenEntropy(0.4),
        )
    ),
]
_GOOD_STEP = generator_pb2.GenerateStepRequest(
    problem="1 + 1?", steps=[_STEP, _STEP], sampling=_SAMPLING, max_tokens=8, stream_text=True
)
_GOOD_STEP.time_limit.FromMilliseconds(500)

RPCS = (
    Rpc(ORCHESTRATOR, "GenerateSolution", "orchestrator", 4, _GOOD_SOLUTIONS, _is_solution),
    Rpc(
        ORCHESTRATOR,
        "GetCapabilities",
        "orchestrator",
        0.4,
        [orchestrator_pb2.GetCapabilitiesRequest()],
        lambda request, answers: capabilities_from_proto(answers[0]),
    ),
    Rpc(GENERATOR, "GenerateStep", "draft", 4, [_GOOD_STEP], _is_step),
    Rpc(
        GENERATOR,
        "GetGenerator",
        "draft",
        0.4,
        [generator_pb2.GetGeneratorRequest()],
        lambda request, answers: None,
    ),
    Rpc(
        PRM,
        "ScoreSteps",
        "prm",
        4,
        [prm_pb2.ScoreStepsRequest(problem="1 + 1?", steps=[_STEP] * 3, skip_count=1)],
        _is_scores,
    ),
    Rpc(PRM, "GetPrm", "prm", 0.4, [prm_pb2.GetPrmRequest()], lambda request, answers: None),
    Rpc(
        ROUTER,
        "EstimateAdvantage",
        "router",
        4,
        [router_pb2.EstimateAdvantageRequest(problem="1 + 1?", steps=[_STEP], candidate="= 2")],
        lambda request, answers: advantage_from_proto(answers[0]),
    ),
    Rpc(
        ROUTER,
        "GetRouter",
        "router",
        0.4,
        [router_pb2.GetRouterRequest()],
        lambda request, answers: router_from_proto(answers[0]),
    ),
)


@asynccontextmanager
async def fake_deployment() -> AsyncIterator[dict[str, str]]:
    """Serves all four services with engines that answer at once; yields addresses by role."""
    house = House()
    async with house.open():
        yield {role: server.address for role, server in house.servers.items()} | {
            "orchestrator": house.address
        }


@asynccontextmanager
async def tiny_deployment() -> AsyncIterator[dict[str, str]]:
    """Serves all four services with the shipped models; yields addresses by role."""

    def loaded() -> tuple[GeneratorEngine, GeneratorEngine, PrmEngine, RouterEngine]:
        pack = find_pack("tiny")

        def model(role: str, kind: ModelKind) -> Any:
            return load_model(str(pack.model_reference(role)), kind)

        return (
            TransformersGenerator(model("draft", ModelKind.CAUSAL_LM)),
            TransformersGenerator(model("target", ModelKind.CAUSAL_LM)),
            TransformersPrm(model("prm", ModelKind.TOKEN_CLASSIFICATION)),
            TransformersRouter(model("router", ModelKind.SEQUENCE_CLASSIFICATION)),
        )

    draft, target, prm, router = await asyncio.to_thread(loaded)
    servicers = {
        "draft": (GENERATOR, GeneratorServicer(draft, 32)),
        "target": (GENERATOR, GeneratorServicer(target, 32)),
        "prm": (PRM, PrmServicer(prm)),
        "router": (ROUTER, RouterServicer(router)),
    }
    async with AsyncExitStack() as stack:
        for engine in (draft, target, prm, router):
            stack.push_async_callback(engine.close)
        addresses = {}
        for role, (service, servicer) in servicers.items():
            server = await stack.enter_async_context(serving(service, servicer))
            addresses[role] = server.address
        settings = {f"{role}_address": address for role, address in addresses.items()}
        orchestrator = await stack.enter_async_context(
            build(OrchestratorSettings(**{**settings, **_SMALL}), Telemetry())
        )
        server = await stack.enter_async_context(serving(ORCHESTRATOR, orchestrator))
        yield addresses | {"orchestrator": server.address}


@asynccontextmanager
async def rpc_boundaries(
    addresses: dict[str, str], engines: str, concurrency: int, longest_s: float = LONGEST_S
) -> AsyncIterator[list[Boundary]]:
    """Opens a channel to each role and yields a boundary for each rpc."""
    async with AsyncExitStack() as stack:
        channels = {}
        for role, address in addresses.items():
            channel = grpc.aio.insecure_channel(
                address,
                options=(
                    ("grpc.max_send_message_length", -1),
                    ("grpc.max_receive_message_length", -1),
                ),
            )
            channels[role] = await stack.enter_async_context(channel)
        yield [
            Boundary(
                f"{engines} {rpc.method}",
                rpc.weight,
                _drawing(rpc),
                _attempting(rpc, channels[rpc.role], longest_s),
                concurrency,
            )
            for rpc in RPCS
        ]


def _drawing(rpc: Rpc) -> Callable[[OddValues], bytes]:
    kind = type(rpc.good[0])

    def draw(odd: OddValues) -> bytes:
        kinds = ("random", "changed bytes", "odd", "changed", "flood", "too large")
        match odd.coin.choices(kinds, (400, 1000, 1200, 1400, 5, 1))[0]:
            case "random":
                return odd.coin.randbytes(odd.coin.randint(0, 60))
            case "changed bytes":
                return odd.changed_bytes(odd.one_of(rpc.good).SerializeToString())
            case "odd":
                return odd.message(kind).SerializeToString()
            case "changed":
                return odd.changed_message(odd.one_of(rpc.good)).SerializeToString()
            case "flood":
                return _flood(odd, rpc.good[0])
            case _:
                return _TOO_LARGE

    return draw


def _flood(odd: OddValues, good: Message) -> bytes:
    """Returns megabytes of one field again and again, and an end that may be broken."""
    fields = [
        field
        for field in good.DESCRIPTOR.fields
        if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE)
    ]
    number = odd.one_of(fields).number if fields else 15
    # An empty text or message, the smallest step, the smallest message of a chat, or one long text.
    value = odd.one_of(
        (b"\0", b"\4\x10\1\x18\1", b"\4\x0a\2\x08\2", b"\x80\x80\x40" + b"a " * 2**19)
    )
    unit = bytes((number << 3 | 2,)) + value
    end = odd.one_of((b"", b"\x0a\x01\xff", b"\x0a\x7f"))
    return unit * (odd.one_of((1, 15)) * 2**20 // len(unit)) + end


def _attempting(rpc: Rpc, channel: grpc.aio.Channel, longest_s: float) -> Callable[[bytes], Any]:
    method = rpc.service.methods_by_name[rpc.method]
    request_kind, answer_kind = type(rpc.good[0]), GetMessageClass(method.output_type)
    untyped: Any = channel
    path = f"/{rpc.service.full_name}/{rpc.method}"
    call: Any = untyped.unary_stream(path) if method.server_streaming else untyped.unary_unary(path)

    async def attempt(request: bytes) -> str:
        try:
            if method.server_streaming:
                received = [answer async for answer in call(request, timeout=longest_s)]
            else:
                received = [await call(request, timeout=longest_s)]
        except grpc.aio.AioRpcError as error:
            return _refusal(error)
        answers = [answer_kind.FromString(answer) for answer in received]
        rpc.check(request_kind.FromString(request), answers)
        return ACCEPTED

    return attempt


def _refusal(rpc_error: grpc.aio.AioRpcError) -> str:
    error = from_rpc_error(rpc_error)
    legible(str(error))
    if CODES[error.reason] not in _REFUSALS:
        raise Wrong(f"it was answered with {rpc_error.code().name}: {error}")
    if isinstance(error, InvalidRequest) and not (error.field and error.problem and error.fix):
        raise Wrong(f"the refusal lacks field, value or fix: {error}")
    return error.reason
