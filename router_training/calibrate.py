"""Measures what share of steps each threshold escalates, on the router's own prefixes.

The product's loop runs at every threshold. Draft and target are asked once per prefix: runs that
share a prefix share the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import numpy as np

from arbitrage.core.calibration import CalibrationTable
from arbitrage.core.errors import ArbitrageError
from arbitrage.core.ledger import Ledger
from arbitrage.core.limits import Budgets
from arbitrage.core.policies import ArbitragePolicy, written_step
from arbitrage.core.ports import Generator, Models, Router, StepRequest
from arbitrage.core.speculation import SolutionRequest, generate_solution
from arbitrage.core.steps import GeneratedStep, Score, Trajectory
from router_training.config import Collect
from router_training.errors import ServiceFailed
from router_training.metrics import Floats

_POINTS = 33


class RememberingGenerator:
    """Writes each prefix's step once. For greedy decoding, whose steps never differ."""

    def __init__(self, inner: Generator) -> None:
        self._inner = inner
        self._steps: dict[tuple[Trajectory, int], GeneratedStep] = {}

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        """Yields the step, from memory where the prefix was met before."""
        key = (request.trajectory, request.max_tokens)
        if key not in self._steps:
            self._steps[key] = await written_step(self._inner, request)
        yield self._steps[key]


class RememberingRouter:
    """Judges each candidate once."""

    def __init__(self, inner: Router) -> None:
        self._inner = inner
        self._scores: dict[tuple[Trajectory, str], Score] = {}

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Score:
        """Returns the score, from memory where the candidate was met before."""
        key = (trajectory, draft_text)
        if key not in self._scores:
            self._scores[key] = await self._inner.estimate_advantage(trajectory, draft_text)
        return self._scores[key]


def threshold_grid(scores: Floats) -> list[float]:
    """Returns thresholds 0 to 1, closer where scores are: quantiles of seen ones.

    >>> threshold_grid(np.array([0.2, 0.4]))[0], threshold_grid(np.array([0.2, 0.4]))[-1]
    (0.0, 1.0)
    """
    quantiles = np.quantile(scores, np.linspace(0.0, 1.0, _POINTS))
    return sorted({0.0, 1.0, *(significant(float(q)) for q in quantiles)})


def significant(threshold: float) -> float:
    """Returns a threshold with six digits, wherever its point stands; scores crowd at 0 and 1.

    >>> significant(0.00012345678), significant(0.123456789)
    (0.000123457, 0.123457)
    """
    return float(f"{threshold:.6g}")


async def calibration_table(
    problems: Sequence[str],
    models: Models,
    router: Router,
    thresholds: Sequence[float],
    settings: Collect,
) -> CalibrationTable:
    """Returns threshold against share of escalated steps, measured on `problems`.

    Raises:
        ServiceFailed: draft or target failed.
    """
    budgets = Budgets(
        max_steps=settings.max_steps,
        max_tokens=settings.max_steps * settings.max_step_tokens,
        max_step_tokens=settings.max_step_tokens,
    )
    places = asyncio.Semaphore(settings.concurrency)

    async def counts(problem: str) -> list[tuple[int, int]]:
        remembered = Models(
            RememberingGenerator(models.draft),
            RememberingGenerator(models.target),
            models.prm,
            RememberingRouter(router),
        )
        found = []
        async with places:
            for threshold in thresholds:
                ledger = Ledger()
                request = SolutionRequest(problem, ArbitragePolicy(threshold), budgets)
                async for _ in generate_solution(request, remembered, ledger=ledger):
                    pass
                found.append((ledger.escalation_count, ledger.routed_step_count))
        return found

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(counts(problem)) for problem in problems]
    except ExceptionGroup as errors:
        if (failed := errors.subgroup(ArbitrageError)) is not None:
            raise ServiceFailed(f"calibration: {failed.exceptions[0]}; mend the service") from None
        raise
    totals = np.sum([task.result() for task in tasks], axis=0)  # [thresholds, 2]
    shares = totals[:, 0] / np.maximum(1, totals[:, 1])
    # More caution never means more escalations in the table, whatever a sample says.
    falling = np.minimum.accumulate(shares)
    return CalibrationTable(tuple(thresholds), tuple(round(float(s), 4) for s in falling))
