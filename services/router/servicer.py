"""Answers RouterService calls with an engine."""

from __future__ import annotations

from arbitrage.core.steps import Trajectory
from arbitrage.v1 import router_pb2, router_pb2_grpc
from services.engines.base import RouterEngine
from services.rpc.convert import identity_to_proto, router_to_proto, steps_from_proto
from services.rpc.handlers import Context


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Judges draft steps with one model."""

    def __init__(self, engine: RouterEngine) -> None:
        self._engine = engine

    async def EstimateAdvantage(  # noqa: N802 - the proto's name
        self, request: router_pb2.EstimateAdvantageRequest, context: Context
    ) -> router_pb2.EstimateAdvantageResponse:
        """Gives the probability that the target's step would be better."""
        trajectory = Trajectory(request.problem, steps_from_proto(request.steps))
        advantage = await self._engine.estimate_advantage(trajectory, request.candidate)
        score = advantage.score
        return router_pb2.EstimateAdvantageResponse(
            score=score.value,
            prefill_token_count=score.prefill_token_count,
            cached_token_count=score.cached_token_count,
            truncated_token_count=advantage.truncated_token_count,
            model=identity_to_proto(score.model),
        )

    async def GetRouter(  # noqa: N802 - the proto's name
        self, request: router_pb2.GetRouterRequest, context: Context
    ) -> router_pb2.GetRouterResponse:
        """Describes the router."""
        return router_to_proto(self._engine.description)
