"""The algorithm's ports with the prefix cache in front of them.

What lies in the store are messages of `arbitrage.v1`, so that orchestrators of two versions can
read each other's entries.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from arbitrage.core.errors import DeadlineExceeded
from arbitrage.core.ports import Generator, StepRequest
from arbitrage.core.steps import GeneratedStep, Score, Source, StopReason, Trajectory
from arbitrage.v1 import generator_pb2, router_pb2
from services.orchestrator.digests import score_question, step_question
from services.orchestrator.prefix_cache import PrefixCache
from services.rpc.convert import (
    advantage_from_proto,
    generated_step_from_proto,
    generated_step_to_proto,
    identity_to_proto,
)

AnswerT = TypeVar("AnswerT", GeneratedStep, Score)
_NORMAL_ENDS = frozenset({StopReason.SEPARATOR, StopReason.END_OF_SEQUENCE, StopReason.STEP_LENGTH})


# Asks a PRM or a router about a step; the third argument is a moment of the monotonic clock.
ScoreCall = Callable[[Trajectory, str, float | None], Awaitable[Score]]


class OwnSteps:
    """The steps that a request had its models write, because nobody had them.

    What comes after such a step is new ground: nobody can have asked for it before, so the request
    goes to the model without a look into the store.
    """

    def __init__(self) -> None:
        self._written: set[tuple[int, Source, str]] = set()

    def add(self, prefix: Trajectory, source: Source, text: str) -> None:
        """Notes a step that was written after `prefix`."""
        self._written.add((len(prefix.steps), source, text))

    def end(self, trajectory: Trajectory) -> bool:
        """Whether a trajectory ends with one of them."""
        if not trajectory.steps:
            return False
        last = trajectory.steps[-1]
        return (len(trajectory.steps) - 1, last.source, last.text) in self._written

    def has(self, prefix: Trajectory, text: str) -> bool:
        """Whether a step after `prefix` is one of them, whoever wrote it."""
        return any((len(prefix.steps), source, text) in self._written for source in Source)


@dataclass(frozen=True, slots=True)
class CachedGenerator:
    """Writes a step once for every prefix, where `is_cacheable`.

    A request whose caller gave no seed is not: its seed is its own, and nobody asks it again. A
    step that was found comes as one text delta, where deltas were asked for.
    """

    inner: Generator
    cache: PrefixCache
    source: Source
    own: OwnSteps
    is_cacheable: bool = True

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        """Yields what the model would, from the cache where it is there."""
        if not (self.is_cacheable and request.sampling.is_deterministic):
            self.cache.bypass(self.source.value)
            async with aclosing(self.inner.generate_step(request)) as items:
                async for item in items:
                    yield item
            return
        limit_s = request.time_limit_s
        deadline_s = None if limit_s is None else time.monotonic() + limit_s
        found = await self.cache.find(
            self.source.value,
            step_question(request),
            deadline_s,
            # A step that is streamed goes as slowly as its reader; nobody else shall wait for that.
            may_be_shared=not request.stream_text,
            is_new=self.own.end(request.trajectory),
        )
        if isinstance(found, bytes):
            step = generated_step_from_proto(generator_pb2.GeneratedStep.FromString(found))
            if request.stream_text and step.text:
                yield step.text
            yield _all_cached(step)
            return
        async with found:
            if deadline_s is not None:
                # The wait for a call of another request has used up some of this one's time.
                request = _within(request, deadline_s - time.monotonic())
            async with aclosing(self.inner.generate_step(request)) as items:
                async for item in items:
                    if isinstance(item, GeneratedStep) and item.stop_reason in _NORMAL_ENDS:
                        answer = generated_step_to_proto(item).SerializeToString()
                        found.keep(item.model.revision, answer)
                        self.own.add(request.trajectory, self.source, item.text)
                    yield item


@dataclass(frozen=True, slots=True)
class CachedScorer:
    """Scores a step once for every prefix: both the `Scorer` and the `Router` port.

    `deadline_s` is the moment of the monotonic clock at which the request's time is over.
    """

    ask: ScoreCall
    cache: PrefixCache | None
    role: str
    own: OwnSteps
    deadline_s: float | None

    async def score_step(self, trajectory: Trajectory, step_text: str) -> Score:
        """Returns the score of a step, from the cache where it is there."""
        if self.cache is None:
            return await self.ask(trajectory, step_text, self.deadline_s)
        question = score_question(trajectory, step_text)
        is_new = self.own.has(trajectory, step_text)
        found = await self.cache.find(self.role, question, self.deadline_s, is_new=is_new)
        if isinstance(found, bytes):
            message = router_pb2.EstimateAdvantageResponse.FromString(found)
            score = advantage_from_proto(message)
            return _all_cached(score)
        async with found:
            score = await self.ask(trajectory, step_text, self.deadline_s)
            message = router_pb2.EstimateAdvantageResponse(
                score=score.value,
                prefill_token_count=score.prefill_token_count,
                cached_token_count=score.cached_token_count,
                model=identity_to_proto(score.model),
            )
            found.keep(score.model.revision, message.SerializeToString())
        return score

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Score:
        """Returns the router's score of a draft step."""
        return await self.score_step(trajectory, draft_text)


def _within(request: StepRequest, left_s: float) -> StepRequest:
    if left_s <= 0.0:
        raise DeadlineExceeded("the time limit was over before the step was")
    return replace(request, time_limit_s=left_s)


def _all_cached(answer: AnswerT) -> AnswerT:
    prompt_count = answer.prefill_token_count + answer.cached_token_count
    return replace(answer, prefill_token_count=0, cached_token_count=prompt_count)
