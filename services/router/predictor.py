"""The router as a predictor of the Open Inference Protocol, and behind one. Needs kserve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from arbitrage.core.steps import Trajectory
from services.engines.base import RouterEngine
from services.engines.oip_judges import OipRouter
from services.engines.oip_rows import ROUTER_INPUTS, Judgement, steps_from_json
from services.engines.oip_server import OipServer
from services.engines.router_format import FormatError, read_router_format
from services.router.settings import RouterSettings
from services.rpc.kserve_server import served_by_kserve
from services.rpc.program import StartError
from services.rpc.settings import variable_of


def predictor(settings: RouterSettings, engine: RouterEngine) -> AbstractAsyncContextManager[None]:
    """Returns what serves the score of each row's candidate."""

    async def judge(row: Sequence[str], number: int) -> Judgement:
        problem, history, candidate = row
        trajectory = Trajectory(problem, steps_from_json(history, number))
        advantage = await engine.estimate_advantage(trajectory, candidate)
        score = advantage.score
        return Judgement(
            score.value,
            score.model.revision,
            score.prefill_token_count,
            score.cached_token_count,
            advantage.truncated_token_count,
        )

    return served_by_kserve(settings, "router", ROUTER_INPUTS, judge)


def remote_router(settings: RouterSettings) -> Callable[[OipServer], OipRouter]:
    """Returns what makes an engine that asks a server.

    Raises:
        StartError: router.json cannot be used.
    """
    assert settings.engine_router_json is not None, "the settings were checked"
    try:
        known = read_router_format(settings.engine_router_json)
    except FormatError as error:
        raise StartError(
            f"{variable_of('engine_router_json')}: {settings.engine_router_json}: {error}"
        ) from error
    return partial(OipRouter, known=known)
