"""Answers GeneratorService calls with an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from arbitrage.core.steps import SEPARATOR
from arbitrage.v1 import generator_pb2, generator_pb2_grpc
from services.engines.base import GeneratorEngine
from services.rpc.convert import (
    generated_step_to_proto,
    identity_to_proto,
    step_request_from_proto,
)
from services.rpc.handlers import Context


class GeneratorServicer(generator_pb2_grpc.GeneratorServiceServicer):
    """Writes steps with one model."""

    def __init__(self, engine: GeneratorEngine, default_max_step_tokens: int) -> None:
        self._engine = engine
        self._default_max_tokens = min(default_max_step_tokens, engine.max_context_tokens)

    async def GenerateStep(  # noqa: N802 - the proto's name
        self, request: generator_pb2.GenerateStepRequest, context: Context
    ) -> AsyncGenerator[generator_pb2.GenerateStepResponse, None]:
        """Yields text deltas when asked for, then the step."""
        wanted = step_request_from_proto(request, self._default_max_tokens)
        async with aclosing(self._engine.generate_step(wanted)) as items:
            async for item in items:
                if isinstance(item, str):
                    yield generator_pb2.GenerateStepResponse(text_delta=item)
                else:
                    yield generator_pb2.GenerateStepResponse(result=generated_step_to_proto(item))

    async def GetGenerator(  # noqa: N802 - the proto's name
        self, request: generator_pb2.GetGeneratorRequest, context: Context
    ) -> generator_pb2.GetGeneratorResponse:
        """Describes the model."""
        return generator_pb2.GetGeneratorResponse(
            model=identity_to_proto(self._engine.identity),
            max_context_tokens=self._engine.max_context_tokens,
            separator=SEPARATOR,
        )
