"""Models behind gRPC, as the algorithm's ports.

One channel per role; every call has a deadline; closing a step's iterator cancels its call. What
goes wrong on the way is the role's `ModelUnavailable`; what the model refuses keeps its reason.
An overloaded model is asked again a few times, and counts as unavailable after that.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from arbitrage.core.errors import (
    ModelUnavailable,
    PrmUnavailable,
    RouterUnavailable,
)
from arbitrage.core.ports import RouterDescription, StepRequest
from arbitrage.core.steps import GeneratedStep, ModelIdentity, Score, Source, Step, Trajectory
from arbitrage.v1 import (
    generator_pb2,
    generator_pb2_grpc,
    prm_pb2,
    prm_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)
from services.rpc.calls import DEFAULT_LIMITS, CallLimits, ModelCall, asked, left_s, role_of
from services.rpc.convert import (
    advantage_from_proto,
    generated_step_from_proto,
    identity_from_proto,
    reward_from_proto,
    router_from_proto,
    step_request_to_proto,
    step_to_proto,
)
from services.rpc.tracing import Metadata, asking

_log = logging.getLogger(__name__)
_MIB = 1 << 20
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 2.0
_HEALTH_TIMEOUT_S = 2.0
# A model takes no time limit of 0 s; this one it answers with what the limit means.
_LEAST_TIME_LIMIT_S = 1e-3
_SILENCE_TRUST_S = 5.0
# Scores of routers before the present one are met for as long as they lie in a cache.
_KNOWN_ROUTERS = 8


def open_channel(address: str, max_message_mib: int = 16) -> grpc.aio.Channel:
    """Returns a channel to a model service. It connects when it is first used."""
    return grpc.aio.insecure_channel(
        address,
        options=(
            ("grpc.max_receive_message_length", max_message_mib * _MIB),
            ("grpc.max_send_message_length", max_message_mib * _MIB),
            # By default gRPC waits up to two minutes before it tries a lost server again.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ),
    )


async def wait_until_serving(channel: grpc.aio.Channel, service: str, what: str) -> None:
    """Returns once `service` reports SERVING; asks again and again, ever more slowly."""
    stub = health_pb2_grpc.HealthStub(channel)
    wait_s, reported = _FIRST_WAIT_S, False
    while True:
        try:
            answer = await stub.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=_HEALTH_TIMEOUT_S
            )
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
        except grpc.aio.AioRpcError as error:
            if wait_s >= _LONGEST_WAIT_S and not reported:
                _log.warning("still waiting for %s: %s", what, error.code().name)
                reported = True
        await asyncio.sleep(wait_s)
        wait_s = min(_LONGEST_WAIT_S, wait_s * 2)


class GrpcGenerator:
    """Writes steps through a generator service."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        unavailable: type[ModelUnavailable],
        limits: CallLimits = DEFAULT_LIMITS,
    ) -> None:
        self._stub: generator_pb2_grpc.GeneratorServiceAsyncStub = (
            generator_pb2_grpc.GeneratorServiceStub(channel)
        )
        self._unavailable = unavailable
        self._limits = limits

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        """Yields text as it is decoded, where asked for, then exactly one result, last.

        Raises:
            DeadlineExceeded: the request's time limit is over.
            ModelUnavailable: nobody answered, or not in the time any call may take.
            ArbitrageError: the model refused, for the reason it gave.
        """
        with asking(role_of(self._unavailable), "GenerateStep") as asked_model:
            async with aclosing(self._attempts(request, asked_model.metadata)) as items:
                async for item in items:
                    if isinstance(item, GeneratedStep):
                        asked_model.answered(item)
                    yield item

    async def _attempts(
        self, request: StepRequest, metadata: Metadata
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        limit_s, own_limit_s, asked_s = request.time_limit_s, None, time.monotonic()
        if limit_s is not None:
            own_limit_s = limit_s + self._limits.grace_s
        call = ModelCall(self._unavailable, self._limits.timeout_s, own_limit_s)
        while True:
            stream = self._stub.GenerateStep(
                step_request_to_proto(request), timeout=call.timeout_s(), metadata=metadata
            )
            has_begun = has_result = False
            try:
                async for message in stream:
                    has_begun = True
                    if message.WhichOneof("event") == "text_delta":
                        yield message.text_delta
                    else:
                        has_result = True
                        yield call.answer(generated_step_from_proto, message.result)
                if not has_result:
                    raise self._unavailable("the generator's stream ended without a step")
                return
            except grpc.aio.AioRpcError as error:
                if has_result:
                    return
                await call.failed(error, may_repeat=not has_begun)
                if limit_s is not None:
                    # The wait for an overloaded model has used up some of the request's time.
                    left_s = limit_s - (time.monotonic() - asked_s)
                    request = replace(request, time_limit_s=max(_LEAST_TIME_LIMIT_S, left_s))
            finally:
                stream.cancel()

    async def describe(self) -> ModelIdentity:
        """Asks which weights answer.

        Raises:
            ModelUnavailable
        """
        return identity_from_proto((await self._description()).model)

    async def separator(self) -> str:
        """Asks which text ends a step.

        Raises:
            ModelUnavailable
        """
        return (await self._description()).separator

    async def _description(self) -> generator_pb2.GetGeneratorResponse:
        call = ModelCall(self._unavailable, self._limits.grace_s)
        return await asked(call, self._stub.GetGenerator, generator_pb2.GetGeneratorRequest())


class GrpcScorer:
    """Scores steps through a PRM service."""

    def __init__(self, channel: grpc.aio.Channel, limits: CallLimits = DEFAULT_LIMITS) -> None:
        self._stub: prm_pb2_grpc.PrmServiceAsyncStub = prm_pb2_grpc.PrmServiceStub(channel)
        self._limits = limits

    async def score_step(
        self, trajectory: Trajectory, step_text: str, deadline_s: float | None = None
    ) -> Score:
        """Returns the reward of a step; `deadline_s` is a moment of the monotonic clock.

        Raises:
            DeadlineExceeded, PrmUnavailable, ArbitrageError
        """
        # Who wrote the step is nothing a PRM looks at, but the message has to say something.
        candidate = Step(step_text, Source.DRAFT)
        request = prm_pb2.ScoreStepsRequest(
            problem=trajectory.problem,
            steps=[step_to_proto(step) for step in (*trajectory.steps, candidate)],
            skip_count=len(trajectory.steps),
        )
        call = ModelCall(PrmUnavailable, self._limits.timeout_s, left_s(deadline_s))
        answer = await asked(call, self._stub.ScoreSteps, request)
        return call.answer(reward_from_proto, answer)

    async def describe(self) -> ModelIdentity:
        """Asks which weights answer.

        Raises:
            PrmUnavailable
        """
        call = ModelCall(PrmUnavailable, self._limits.grace_s)
        answer = await asked(call, self._stub.GetPrm, prm_pb2.GetPrmRequest())
        return identity_from_proto(answer.model)


class GrpcRouter:
    """Judges draft steps through a router service.

    `on_truncated` is told how many history tokens the router cut to fit its context.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        limits: CallLimits = DEFAULT_LIMITS,
        on_truncated: Callable[[int], None] = lambda token_count: None,
    ) -> None:
        self._stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(
            channel
        )
        self._limits = limits
        self._on_truncated = on_truncated
        self._description: RouterDescription | None = None
        self._described: dict[ModelIdentity, RouterDescription] = {}
        self._silent_until_s = -math.inf

    async def estimate_advantage(
        self, trajectory: Trajectory, draft_text: str, deadline_s: float | None = None
    ) -> Score:
        """Returns the router score; `deadline_s` is a moment of the monotonic clock.

        Raises:
            DeadlineExceeded, RouterUnavailable, ArbitrageError
        """
        request = router_pb2.EstimateAdvantageRequest(
            problem=trajectory.problem,
            steps=[step_to_proto(step) for step in trajectory.steps],
            candidate=draft_text,
        )
        call = ModelCall(RouterUnavailable, self._limits.timeout_s, left_s(deadline_s))
        answer = await asked(call, self._stub.EstimateAdvantage, request)
        score = call.answer(advantage_from_proto, answer)
        self._on_truncated(answer.truncated_token_count)
        if self._description is not None and self._description.model != score.model:
            # Another router answers now; its thresholds are not those of the one before.
            self._description = None
        return score

    async def describe_model(
        self, model: ModelIdentity, deadline_s: float | None = None
    ) -> RouterDescription:
        """Returns what the router said of itself while it had these weights.

        Scores outlive their router by a moment: in a cache, or on their way while it is replaced.

        Raises:
            DeadlineExceeded
            RouterUnavailable: nobody answered, or the weights are gone and were never described.
        """
        if model not in self._described:
            self._description = None
            await self.describe(deadline_s)
        if model not in self._described:
            raise RouterUnavailable(f"the router that gave a score, {model}, has been replaced")
        return self._described[model]

    async def describe(self, deadline_s: float | None = None) -> RouterDescription:
        """Returns what the router says of itself, asked for once per revision.

        A router that said nothing is not asked again for some seconds, so that not every step
        waits for it. `deadline_s` is a moment of the monotonic clock.

        Raises:
            DeadlineExceeded, RouterUnavailable
        """
        if self._description is None:
            if time.monotonic() < self._silent_until_s:
                raise RouterUnavailable("the router did not answer a moment ago")
            try:
                self._description = found = await self.ask_description(deadline_s)
            except RouterUnavailable:
                self._silent_until_s = time.monotonic() + _SILENCE_TRUST_S
                raise
            self._described[found.model] = found
            while len(self._described) > _KNOWN_ROUTERS:
                del self._described[next(iter(self._described))]
        return self._description

    async def ask_description(self, deadline_s: float | None = None) -> RouterDescription:
        """Asks the router now, whatever it said before.

        Raises:
            DeadlineExceeded, RouterUnavailable
        """
        call = ModelCall(RouterUnavailable, self._limits.grace_s, left_s(deadline_s))
        answer = await asked(call, self._stub.GetRouter, router_pb2.GetRouterRequest())
        return call.answer(router_from_proto, answer)
