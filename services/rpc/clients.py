"""Models behind gRPC, as the algorithm's ports.

One pool of replicas per role; every call has a deadline; closing a step's iterator cancels its
call. What goes wrong on the way is the role's `ModelUnavailable`; what the model refuses keeps its
reason. An overloaded model is asked again a few times, and counts as unavailable after that.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import grpc.aio

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
from services.rpc.calls import (
    DEFAULT_LIMITS,
    CallLimits,
    ModelCall,
    asked,
    key_of,
    left_s,
    role_of,
)
from services.rpc.convert import (
    advantage_from_proto,
    generated_step_from_proto,
    identity_from_proto,
    reward_from_proto,
    router_from_proto,
    step_request_to_proto,
    step_to_proto,
)
from services.rpc.pool import Pool, Replica
from services.rpc.tracing import Metadata, asking

# A model takes no time limit of 0 s; this one it answers with what the limit means.
_LEAST_TIME_LIMIT_S = 1e-3
_SILENCE_TRUST_S = 5.0
# Scores of routers before the present one are met for as long as they lie in a cache.
_KNOWN_ROUTERS = 8


class GrpcGenerator:
    """Writes steps through a generator service."""

    def __init__(
        self, pool: Pool, unavailable: type[ModelUnavailable], limits: CallLimits = DEFAULT_LIMITS
    ) -> None:
        self._pool = pool
        self._unavailable = unavailable
        self._limits = limits

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        """Yields text as it is decoded, where asked for, then exactly one result, last.

        A replica that fails in the middle of a step is made up for by another, whose text is the
        same where sampling is deterministic: what was yielded already is passed over.

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
        limit_s, own_limit_s = request.time_limit_s, None
        if limit_s is not None:
            own_limit_s = limit_s + self._limits.grace_s
        call = ModelCall(
            self._pool,
            key_of(request.trajectory.problem),
            self._unavailable,
            self._limits.timeout_s,
            own_limit_s,
            kind="first text" if request.stream_text else "step",
        )

        def ask(replica: Replica, timeout_s: float) -> Any:
            left_s = limit_s
            if limit_s is not None:
                # Whoever was asked before has used up some of the request's time.
                left_s = max(_LEAST_TIME_LIMIT_S, limit_s - call.waited_s)
            message = step_request_to_proto(dataclasses.replace(request, time_limit_s=left_s))
            stub = replica.stub(generator_pb2_grpc.GeneratorServiceStub)
            return stub.GenerateStep(message, timeout=timeout_s, metadata=metadata)

        told = ""
        while True:
            async with call.attempt(ask) as attempt:
                has_result, come = False, ""
                try:
                    while (message := await attempt.read()) is not None:
                        if message.WhichOneof("event") == "text_delta":
                            come += message.text_delta
                            # What was told cannot be taken back. Where another replica writes
                            # otherwise no more is, and the result says what counts.
                            if len(come) > len(told) and come.startswith(told):
                                text, told = come[len(told) :], come
                                yield text
                        else:
                            has_result = True
                            attempt.replica.succeeded()
                            yield call.answer(generated_step_from_proto, message.result)
                    if not has_result:
                        raise self._unavailable("the generator's stream ended without a step")
                    return
                except grpc.aio.AioRpcError as error:
                    if has_result:
                        return
                    failure = error
            may_repeat = not told or request.sampling.is_deterministic
            await call.failed(attempt.replica, failure, may_repeat=may_repeat)

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
        call = ModelCall(self._pool, b"", self._unavailable, self._limits.grace_s)
        answer: generator_pb2.GetGeneratorResponse = await asked(
            call,
            generator_pb2_grpc.GeneratorServiceStub,
            "GetGenerator",
            generator_pb2.GetGeneratorRequest(),
        )
        return answer


class GrpcScorer:
    """Scores steps through a PRM service."""

    def __init__(self, pool: Pool, limits: CallLimits = DEFAULT_LIMITS) -> None:
        self._pool = pool
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
        call = ModelCall(
            self._pool,
            key_of(trajectory.problem),
            PrmUnavailable,
            self._limits.timeout_s,
            left_s(deadline_s),
            kind="score",
        )
        answer = await asked(call, prm_pb2_grpc.PrmServiceStub, "ScoreSteps", request)
        return call.answer(reward_from_proto, answer)

    async def describe(self) -> ModelIdentity:
        """Asks which weights answer.

        Raises:
            PrmUnavailable
        """
        call = ModelCall(self._pool, b"", PrmUnavailable, self._limits.grace_s)
        answer = await asked(call, prm_pb2_grpc.PrmServiceStub, "GetPrm", prm_pb2.GetPrmRequest())
        return identity_from_proto(answer.model)


class GrpcRouter:
    """Judges draft steps through a router service.

    `on_truncated` is told how many history tokens the router cut to fit its context.
    """

    def __init__(
        self,
        pool: Pool,
        limits: CallLimits = DEFAULT_LIMITS,
        on_truncated: Callable[[int], None] = lambda token_count: None,
    ) -> None:
        self._pool = pool
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
        call = ModelCall(
            self._pool,
            key_of(trajectory.problem),
            RouterUnavailable,
            self._limits.timeout_s,
            left_s(deadline_s),
            kind="score",
        )
        answer = await asked(call, router_pb2_grpc.RouterServiceStub, "EstimateAdvantage", request)
        score = call.answer(advantage_from_proto, answer)
        self._on_truncated(answer.truncated_token_count)
        if self._description is not None and self._description.model != score.model:
            # Another router answers now; its thresholds are not those of the one before.
            self._description = self._described.get(score.model)
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
            call = self._description_call(deadline_s)
            # While routers are replaced one by one, there are two kinds of them.
            while model not in self._described and call.has_another:
                self._keep(await self._asked_description(call))
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
                self._keep(found := await self.ask_description(deadline_s))
            except RouterUnavailable:
                self._silent_until_s = time.monotonic() + _SILENCE_TRUST_S
                raise
            return found
        return self._description

    async def ask_description(self, deadline_s: float | None = None) -> RouterDescription:
        """Asks the router now, whatever it said before.

        Raises:
            DeadlineExceeded, RouterUnavailable
        """
        return await self._asked_description(self._description_call(deadline_s))

    def _keep(self, found: RouterDescription) -> None:
        self._description = found
        self._described[found.model] = found
        while len(self._described) > _KNOWN_ROUTERS:
            del self._described[next(iter(self._described))]

    def _description_call(self, deadline_s: float | None) -> ModelCall:
        return ModelCall(
            self._pool, b"", RouterUnavailable, self._limits.grace_s, left_s(deadline_s)
        )

    async def _asked_description(self, call: ModelCall) -> RouterDescription:
        answer = await asked(
            call, router_pb2_grpc.RouterServiceStub, "GetRouter", router_pb2.GetRouterRequest()
        )
        return call.answer(router_from_proto, answer)
