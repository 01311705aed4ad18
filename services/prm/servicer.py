"""Answers PrmService calls with an engine."""

from __future__ import annotations

from arbitrage.core.errors import FieldInvalid
from arbitrage.v1 import prm_pb2, prm_pb2_grpc
from services.engines.base import PrmEngine
from services.rpc.convert import identity_to_proto, steps_from_proto
from services.rpc.handlers import Context


class PrmServicer(prm_pb2_grpc.PrmServiceServicer):
    """Scores steps with one model."""

    def __init__(self, engine: PrmEngine) -> None:
        self._engine = engine

    async def ScoreSteps(  # noqa: N802 - the proto's name
        self, request: prm_pb2.ScoreStepsRequest, context: Context
    ) -> prm_pb2.ScoreStepsResponse:
        """Scores the steps after the skipped ones."""
        steps = steps_from_proto(request.steps)
        if request.skip_count > len(steps):
            raise FieldInvalid(
                "skip_count",
                request.skip_count,
                f"must be at most the number of steps, {len(steps)}",
                "send the skipped steps too",
            )
        scored = await self._engine.score_steps(request.problem, steps, request.skip_count)
        return prm_pb2.ScoreStepsResponse(
            scores=scored.values,
            prefill_token_count=scored.prefill_token_count,
            cached_token_count=scored.cached_token_count,
            model=identity_to_proto(scored.model),
        )

    async def GetPrm(  # noqa: N802 - the proto's name
        self, request: prm_pb2.GetPrmRequest, context: Context
    ) -> prm_pb2.GetPrmResponse:
        """Describes the model."""
        return prm_pb2.GetPrmResponse(
            model=identity_to_proto(self._engine.identity),
            family=self._engine.family,
            max_context_tokens=self._engine.max_context_tokens,
        )
