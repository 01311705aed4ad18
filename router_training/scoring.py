"""Asks a router checkpoint for scores through the very engine that the router service runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from arbitrage.core.errors import ContextTooLong
from arbitrage.core.steps import Score, Trajectory
from router_training.errors import DatasetInvalid
from router_training.metrics import Floats, Judged, question_numbers
from router_training.rows import Row
from services.engines.loading import ModelKind, ModelLoadError, load_model
from services.engines.scheduler import EngineOptions
from services.engines.transformers_scorers import TransformersRouter

_AT_ONCE = 64


class CheckpointRouter:
    """A checkpoint as the algorithm's `Router` port."""

    def __init__(self, engine: TransformersRouter) -> None:
        self._engine = engine

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Score:
        """Returns the router's score of a draft step."""
        return (await self._engine.estimate_advantage(trajectory, draft_text)).score


@asynccontextmanager
async def loaded_router(folder: Path, threads: int | None) -> AsyncIterator[CheckpointRouter]:
    """Loads a checkpoint folder and stops its engine on the way out.

    Raises:
        DatasetInvalid: it is no router checkpoint.
    """

    def load() -> TransformersRouter:
        loaded = load_model(str(folder), ModelKind.SEQUENCE_CLASSIFICATION)
        return TransformersRouter(loaded, EngineOptions(max_queue=_AT_ONCE, cpu_threads=threads))

    try:
        engine = await asyncio.to_thread(load)
    except ModelLoadError as error:
        raise DatasetInvalid(f"the router cannot be used: {error}") from None
    try:
        yield CheckpointRouter(engine)
    finally:
        await engine.close()


def router_scores(folder: Path, rows: Sequence[Row], threads: int | None = None) -> Floats:
    """Returns the checkpoint's score of each row [rows]; 0 for one that it cannot read whole."""

    async def one(router: CheckpointRouter, row: Row) -> float:
        try:
            prefix = Trajectory(row.problem, row.history)
            return (await router.estimate_advantage(prefix, row.draft_text)).value
        except ContextTooLong:
            return 0.0

    async def all_of_them() -> list[float]:
        async with loaded_router(folder, threads) as router:
            scores: list[float] = []
            for at in range(0, len(rows), _AT_ONCE):
                some = rows[at : at + _AT_ONCE]
                scores += await asyncio.gather(*(one(router, row) for row in some))
            return scores

    return np.asarray(asyncio.run(all_of_them()))


def judged(rows: Sequence[Row], scores: Floats, margin: float) -> Judged:
    """Returns rows as arrays, routed by `scores`."""
    return Judged(
        question_numbers([row.question_id for row in rows]),
        np.array([row.draft_score for row in rows]),
        np.array([sum(row.target_scores) / len(row.target_scores) for row in rows]),
        scores,
        margin,
    )
