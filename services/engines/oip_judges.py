"""A PRM and a router on a server of the Open Inference Protocol, as engines of our services."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NoReturn

import grpc
from kserve import InferenceGRPCClient

from arbitrage.core.errors import (
    FieldInvalid,
    ModelUnavailable,
    Overloaded,
    PrmUnavailable,
    RouterUnavailable,
)
from arbitrage.core.ports import RouterDescription
from arbitrage.core.shown import one_line
from arbitrage.core.steps import ModelIdentity, Score, Source, Step, Trajectory
from services.engines.base import Advantage, EngineStats, StepScores
from services.engines.oip_rows import (
    PRM_INPUTS,
    ROUTER_INPUTS,
    Judgement,
    OddAnswer,
    judgements_of,
    request_of,
    steps_to_json,
)
from services.engines.oip_server import OipServer
from services.engines.router_format import RouterFormat

_NOTHING: Final = EngineStats(0, 0, 0, 0, 0, 0, 1)
_STEP: Final = Step("= 2", Source.DRAFT)
# What the server says of the caller's input; anything else is the server's own trouble.
_CALLERS_FAULT: Final = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE})


class _RemoteJudge:
    """What both engines share: rows sent, judgements read, errors told apart."""

    def __init__(
        self, server: OipServer, inputs: Sequence[str], unavailable: type[ModelUnavailable]
    ) -> None:
        self._server = server
        self._inputs = inputs
        self._unavailable = unavailable
        tls = None if server.ca is None else grpc.ssl_channel_credentials(server.ca)
        # Repeats are the orchestrator's matter.
        self._client = InferenceGRPCClient(
            server.address,
            creds=tls,
            timeout=server.timeout_s,
            channel_args=[("grpc.enable_retries", 0)],
        )
        self.identity = ModelIdentity(server.model, "")
        # The protocol does not tell it; a text that is too long is refused there.
        self.max_context_tokens = 0

    def stats(self) -> EngineStats:
        """Returns nothing: the work is done elsewhere."""
        return _NOTHING

    async def close(self) -> None:
        """Closes the connection."""
        await self._client.close()

    async def judged(self, rows: Sequence[Sequence[str]]) -> list[Judgement]:
        """Returns the judgement of each row.

        Raises:
            FieldInvalid: the server refuses the input.
            Overloaded
            ModelUnavailable: the server does not answer, or not with judgements.
        """
        request = request_of(self._server.model, self._inputs, rows)
        try:
            response = await self._client.infer(request)
            judgements = judgements_of(response, len(rows))
        except grpc.aio.AioRpcError as error:
            self._refuse(error)
        except OddAnswer as error:
            raise self._unavailable(f"{self._where}: its answer {error}") from error
        self.identity = replace(self.identity, revision=judgements[-1].revision)
        return judgements

    @property
    def _where(self) -> str:
        return f"{self._server.model} at {self._server.address}"

    def _refuse(self, error: grpc.aio.AioRpcError) -> NoReturn:
        code, said = error.code(), one_line(error.details() or "", 300)
        if code in _CALLERS_FAULT:
            raise FieldInvalid("steps", "(not shown)", said, "send what it asks for") from error
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise Overloaded(f"{self._where}: {said}") from error
        # DEADLINE_EXCEEDED too: the time that ran out is this client's own, not a caller's.
        raise self._unavailable(f"{self._where}: {code.name}: {said}") from error


class OipPrm(_RemoteJudge):
    """Implements `PrmEngine`: each step is a row, with the steps before it."""

    family = "oip"

    def __init__(self, server: OipServer) -> None:
        super().__init__(server, PRM_INPUTS, PrmUnavailable)

    async def warm_up(self) -> None:
        """Scores one short step."""
        await self.score_steps("1 + 1", (_STEP,))

    async def score_steps(
        self, problem: str, steps: tuple[Step, ...], skip_count: int = 0
    ) -> StepScores:
        """Scores the steps after the first `skip_count`; raises as `judged` does."""
        if not 0 <= skip_count <= len(steps):
            raise ValueError(f"skip_count: expected 0 to {len(steps)}, got {skip_count}")
        if skip_count == len(steps):
            return StepScores((), self.identity)
        ends = range(skip_count + 1, len(steps) + 1)
        judgements = await self.judged([(problem, steps_to_json(steps[:end])) for end in ends])
        if len({judgement.revision for judgement in judgements}) != 1:
            # Scores of two models are no scale.
            raise PrmUnavailable(f"{self._where}: was replaced in the middle of an answer")
        return StepScores(
            tuple(judgement.score for judgement in judgements),
            self.identity,
            sum(judgement.prefill_token_count for judgement in judgements),
            sum(judgement.cached_token_count for judgement in judgements),
        )


class OipRouter(_RemoteJudge):
    """Implements `RouterEngine`; `known` is what the checkpoint's router.json says."""

    def __init__(self, server: OipServer, known: RouterFormat) -> None:
        super().__init__(server, ROUTER_INPUTS, RouterUnavailable)
        self._known = known

    @property
    def description(self) -> RouterDescription:
        """What the router says of itself."""
        return self._known.description(self.identity)

    async def warm_up(self) -> None:
        """Judges one short step."""
        await self.estimate_advantage(Trajectory("1 + 1"), "= 2")

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Advantage:
        """Returns the probability that the target's step beats `draft_text`.

        Raises as `judged` does.
        """
        row = (trajectory.problem, steps_to_json(trajectory.steps), draft_text)
        (judgement,) = await self.judged([row])
        identity = ModelIdentity(self.identity.model_id, judgement.revision)
        score = Score(
            judgement.score,
            identity,
            judgement.prefill_token_count,
            judgement.cached_token_count,
        )
        return Advantage(score, judgement.truncated_token_count)
