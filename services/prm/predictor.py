"""The PRM as a predictor of the Open Inference Protocol. Needs kserve."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from kserve.errors import InvalidInput

from services.engines.base import PrmEngine
from services.engines.oip_rows import PRM_INPUTS, Judgement, steps_from_json
from services.prm.settings import PrmSettings
from services.rpc.kserve_server import served_by_kserve


def predictor(settings: PrmSettings, engine: PrmEngine) -> AbstractAsyncContextManager[None]:
    """Returns what serves the last step's score of each row."""

    async def judge(row: Sequence[str], number: int) -> Judgement:
        problem, history = row
        steps = steps_from_json(history, number)
        if not steps:
            raise InvalidInput(f"steps[{number}]: is empty; send the step to score last")
        scored = await engine.score_steps(problem, steps, len(steps) - 1)
        return Judgement(
            scored.values[0],
            scored.model.revision,
            scored.prefill_token_count,
            scored.cached_token_count,
        )

    return served_by_kserve(settings, "prm", PRM_INPUTS, judge)
