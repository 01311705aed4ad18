"""Counts every model call on the request's ledger, so that neither loop nor policy has to."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from arbitrage.core.ledger import Ledger, TokenLedger
from arbitrage.core.ports import Clock, Generator, Models, Router, Scorer, StepRequest
from arbitrage.core.steps import GeneratedStep, Score, Trajectory


def metered(models: Models, ledger: Ledger, clock: Clock) -> Models:
    """Returns the same models with every call, its tokens and its time put on `ledger`."""
    return Models(
        draft=_MeteredGenerator(models.draft, ledger.draft, clock),
        target=_MeteredGenerator(models.target, ledger.target, clock),
        prm=_MeteredScorer(models.prm, ledger.prm, clock),
        router=_MeteredRouter(models.router, ledger.router, clock),
    )


@dataclass(frozen=True, slots=True)
class _MeteredGenerator:
    inner: Generator
    ledger: TokenLedger
    clock: Clock

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        self.ledger.call_count += 1
        async with aclosing(self.inner.generate_step(request)) as items:
            while True:
                # Only the wait for the model is its time; what a slow reader of the stream does
                # between two items is not.
                started = self.clock()
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                finally:
                    self.ledger.time_s += self.clock() - started
                if isinstance(item, GeneratedStep):
                    self.ledger.record_answer(item)
                yield item


@dataclass(frozen=True, slots=True)
class _MeteredScorer:
    inner: Scorer
    ledger: TokenLedger
    clock: Clock

    async def score_step(self, trajectory: Trajectory, step_text: str) -> Score:
        self.ledger.call_count += 1
        started = self.clock()
        try:
            score = await self.inner.score_step(trajectory, step_text)
        finally:
            self.ledger.time_s += self.clock() - started
        self.ledger.record_answer(score)
        return score


@dataclass(frozen=True, slots=True)
class _MeteredRouter:
    inner: Router
    ledger: TokenLedger
    clock: Clock

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Score:
        self.ledger.call_count += 1
        started = self.clock()
        try:
            score = await self.inner.estimate_advantage(trajectory, draft_text)
        finally:
            self.ledger.time_s += self.clock() - started
        self.ledger.record_answer(score)
        return score
