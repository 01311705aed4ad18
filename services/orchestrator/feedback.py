"""Observes a share of routed steps off the critical path: would the target have done better?

The advantage of a step is unseen where the draft's was accepted. For a seeded share of steps the
target writes too, in the background and while it has room, the PRM judges both, and a record goes
to the sink. No request waits for any of it or fails because of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from arbitrage.core.errors import ArbitrageError, PrmUnavailable
from arbitrage.core.events import Event, StepCommitted
from arbitrage.core.policies import ArbitragePolicy, Policy, written_step
from arbitrage.core.ports import Generator, Models, RouterDescription, Scorer, StepRequest
from arbitrage.core.steps import GeneratedStep, ModelIdentity, Score, Source, Verdict
from arbitrage.v1 import feedback_pb2
from arbitrage.version import VERSION
from services.orchestrator.redis_link import StoreAway
from services.orchestrator.telemetry import FeedbackMetrics
from services.rpc.convert import (
    generated_step_to_proto,
    identity_to_proto,
    sampling_to_proto,
    step_to_proto,
)

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Keeps records."""

    async def append(self, record: feedback_pb2.ObservedStep) -> None:
        """Keeps one.

        Raises:
            OSError, StoreAway: it is lost.
        """
        ...


@dataclass(frozen=True, slots=True)
class FeedbackRules:
    """Which steps are observed: a share `rate` of them, by a hash that `seed` decides.

    At most `max_inflight` are under observation at once, and none is begun while the target
    writes `max_target_inflight` steps or more.
    """

    rate: float
    max_inflight: int = 1
    max_target_inflight: int = 1
    seed: int = 0

    def chooses(self, request_id: str, step_index: int) -> bool:
        """Whether a step is one of the share; nothing about the step itself decides it."""
        digest = hashlib.sha256(f"{self.seed}\0{request_id}\0{step_index}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < self.rate


@dataclass(frozen=True, slots=True)
class Judges:
    """Who is asked in the background: never through the prefix cache, which they would flatter."""

    target: Generator
    prm: Scorer
    describe: Callable[[ModelIdentity], Awaitable[RouterDescription]]
    target_inflight_count: Callable[[], int]


class Feedback:
    """Begins observations and bounds them. Its tasks belong to `group`."""

    def __init__(
        self,
        rules: FeedbackRules,
        judges: Judges,
        sink: Sink,
        metrics: FeedbackMetrics,
        group: asyncio.TaskGroup,
    ) -> None:
        self._rules = rules
        self._judges = judges
        self._sink = sink
        self._metrics = metrics
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()

    def of_solution(self, request_id: str, policy: Policy) -> SolutionFeedback:
        """Returns what watches one solution that runs under `policy`."""
        return SolutionFeedback(self, request_id, policy)

    def offer(self, routed: RoutedStep) -> None:
        """Begins to observe a step, if it is one of the share and there is room."""
        rules = self._rules
        if not rules.chooses(routed.request_id, routed.step_index):
            return
        is_busy = self._judges.target_inflight_count() >= rules.max_target_inflight
        if len(self._tasks) >= rules.max_inflight or is_busy:
            self._metrics.count("no_room")
            return
        task = self._group.create_task(self._observe(routed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Gives up what is under observation; half a record is none."""
        for task in self._tasks:
            task.cancel()

    async def _observe(self, routed: RoutedStep) -> None:
        try:
            target = routed.target or await self._shadow(routed.request)
            if target.is_empty:
                return
            prefix, prm = routed.request.trajectory, self._judges.prm
            draft_score = await prm.score_step(prefix, routed.draft.text)
            target_score = await prm.score_step(prefix, target.text)
            if draft_score.model != target_score.model:
                raise PrmUnavailable("the PRM changed between the two scores of a step")
            router = await self._judges.describe(routed.score.model)
            record = _record(routed, target, (draft_score, target_score), self._rules.rate)
            await self._sink.append(record)
        except (ArbitrageError, OSError, StoreAway) as error:
            self._metrics.count("failed")
            _log.debug("a step could not be observed: %s", error)
            return
        except Exception as error:  # noqa: BLE001 - a defect here must not end requests, nor hide
            self._metrics.count("failed")
            # Only where it happened: an exception's own words may quote a step.
            frames = "".join(traceback.format_tb(error.__traceback__))
            _log.error("a step could not be observed (%s)\n%s", type(error).__name__, frames)
            return
        self._metrics.count("written")
        self._metrics.observe(routed.score, target_score.value - draft_score.value, router)

    async def _shadow(self, request: StepRequest) -> GeneratedStep:
        step = await written_step(self._judges.target, request)
        self._metrics.count_shadow_tokens(step.token_count)
        return step


@dataclass(frozen=True, slots=True)
class RoutedStep:
    """A step the router judged; `target` is what the target wrote, if it was asked."""

    request_id: str
    step_index: int
    request: StepRequest
    draft: GeneratedStep
    target: GeneratedStep | None
    score: Score
    threshold: float


class SolutionFeedback:
    """Watches one solution. It is the policy that the loop asks, and passes its verdicts on.

    Only `arbitrage` has router scores to observe, so that is the one policy it stands for.
    """

    name: ClassVar[str] = ArbitragePolicy.name
    first_writer: ClassVar[Source] = ArbitragePolicy.first_writer
    may_escalate: ClassVar[bool] = ArbitragePolicy.may_escalate

    def __init__(self, feedback: Feedback, request_id: str, policy: Policy) -> None:
        self._feedback = feedback
        self._request_id = request_id
        self._policy = policy
        self._decided: tuple[StepRequest, GeneratedStep] | None = None

    @property
    def entropy_token_count(self) -> int:
        """First tokens whose entropy the draft has to report."""
        return self._policy.entropy_token_count

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Returns the policy's verdict."""
        self._decided = request, draft
        return await self._policy.decide(request, draft, models)

    def observe(self, event: Event) -> None:
        """Offers a step that was committed as the router said."""
        if not isinstance(event, StepCommitted):
            return
        decided, self._decided = self._decided, None
        verdict = event.verdict
        if decided is None or verdict is None or verdict.router_score is None:
            return
        if event.degradations or verdict.threshold is None:
            return
        request, draft = decided
        target = None
        if event.step.source is Source.TARGET:
            target = GeneratedStep(
                event.step.text, event.step.stop_reason, event.token_count, event.writer
            )
        self._feedback.offer(
            RoutedStep(
                self._request_id,
                event.step_index,
                # The request's own time and its reader are nothing to the background.
                replace(request, stream_text=False, time_limit_s=None),
                draft,
                target,
                verdict.router_score,
                verdict.threshold,
            )
        )


def _record(
    routed: RoutedStep, target: GeneratedStep, scores: tuple[Score, Score], rate: float
) -> feedback_pb2.ObservedStep:
    prefix = routed.request.trajectory
    draft_score, target_score = scores
    record = feedback_pb2.ObservedStep(
        request_id=routed.request_id,
        problem=prefix.problem,
        steps=[step_to_proto(step) for step in prefix.steps],
        draft_step=generated_step_to_proto(routed.draft),
        target_steps=[generated_step_to_proto(target)],
        draft_score=draft_score.value,
        target_scores=[target_score.value],
        prm=identity_to_proto(draft_score.model),
        router=identity_to_proto(routed.score.model),
        router_score=routed.score.value,
        threshold=routed.threshold,
        escalated=routed.target is not None,
        propensity=rate,
        sampling=sampling_to_proto(routed.request.sampling),
        code_version=VERSION,
    )
    record.observed_at.GetCurrentTime()
    return record
