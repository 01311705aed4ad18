"""Step-level speculation: the draft proposes, the policy decides, the target is asked only then.

This is the whole algorithm. It knows no transport and no model.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import Enum

from arbitrage.core.errors import (
    ContextTooLong,
    DeadlineExceeded,
    DraftUnavailable,
    Internal,
    RouterUnavailable,
    TargetUnavailable,
)
from arbitrage.core.events import DraftProposed, Event, Finished, StepCommitted, TokenDelta
from arbitrage.core.ledger import Ledger
from arbitrage.core.limits import DEFAULT_BUDGETS, Budgets
from arbitrage.core.metering import metered
from arbitrage.core.policies import Policy
from arbitrage.core.ports import Clock, Models, StepRequest
from arbitrage.core.steps import (
    GREEDY,
    Degradation,
    GeneratedStep,
    Sampling,
    Source,
    Step,
    StopReason,
    Trajectory,
    Verdict,
)


class RouterFallback(Enum):
    """What becomes of a draft step that the router cannot judge."""

    ACCEPT_DRAFT = "accept_draft"
    ESCALATE = "escalate"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class SolutionRequest:
    """Asks for the solution of one problem."""

    problem: str
    policy: Policy
    budgets: Budgets = DEFAULT_BUDGETS
    sampling: Sampling = GREEDY
    allow_degraded: bool = False
    router_fallback: RouterFallback = RouterFallback.ACCEPT_DRAFT
    stream_text: bool = False


async def generate_solution(
    request: SolutionRequest,
    models: Models,
    clock: Clock = time.monotonic,
    *,
    started_s: float | None = None,
    ledger: Ledger | None = None,
    committed: Sequence[StepCommitted] = (),
) -> AsyncGenerator[Event, None]:
    """Yields the events of one solution, `Finished` last.

    Closing the generator stops the model that is working for it. Where a model cannot be reached
    and the request does not say how to go on without it, its `ModelUnavailable` is raised.
    `started_s` is the clock's reading when the request came in, if that was before now. `ledger`
    is filled as the request goes, for whoever has to know what an unfinished one cost.

    A solution that was broken off goes on where it stopped: `committed` are its steps so far and
    `ledger` is what it had cost by the last of them. They are not yielded again.
    """
    run = _Run(
        request,
        models,
        Ledger() if ledger is None else ledger,
        clock,
        clock() if started_s is None else started_s,
        committed,
    )
    try:
        async with aclosing(_events(request, run)) as events:
            async for event in events:
                yield event
    finally:
        # Nothing is pending in a request that has finished.
        run.ledger.cancel_pending()
        run.ledger.elapsed_s = run.elapsed_s


async def _events(request: SolutionRequest, run: _Run) -> AsyncGenerator[Event, None]:
    while (stop_reason := run.stop_reason()) is None:
        turn = _Turn(run)
        try:
            if request.policy.first_writer is Source.DRAFT:
                async with aclosing(turn.write_draft()) as deltas:
                    async for delta in deltas:
                        yield delta
                if turn.draft is not None:
                    yield DraftProposed(run.step_index, turn.draft.text, turn.draft.token_count)
                    await turn.judge(turn.draft)
            if turn.wants_target:
                async with aclosing(turn.write_target()) as deltas:
                    async for delta in deltas:
                        yield delta
        except DeadlineExceeded:
            turn.cancel(StopReason.DEADLINE)
        except ContextTooLong:
            if not run.step_index:
                raise
            # The solution has grown as long as a model can read: what there is of it stands.
            turn.cancel(StopReason.TOTAL_LENGTH)
        else:
            committed = turn.commit()
            if committed is not None:
                yield committed
    run.ledger.elapsed_s = run.elapsed_s
    yield Finished(stop_reason, run.ledger)


class _Run:
    """What one request has so far: its trajectory, its ledger, and what is left of its budgets."""

    def __init__(
        self,
        request: SolutionRequest,
        models: Models,
        ledger: Ledger,
        clock: Clock,
        started_s: float,
        committed: Sequence[StepCommitted],
    ) -> None:
        self.request = request
        self.trajectory = Trajectory(request.problem)
        self.ledger = ledger
        self.models = metered(models, ledger, clock)
        self.target_step_count = 0
        self.ended: StopReason | None = None
        self._clock = clock
        self._started_s = started_s
        for known in committed:
            self.add(known.step)

    def add(self, step: Step) -> None:
        """Puts a step on the trajectory. The one that ends the solution ends the run."""
        self.trajectory = self.trajectory.append(step)
        self.target_step_count += step.source is Source.TARGET
        if step.stop_reason is StopReason.END_OF_SEQUENCE:
            self.ended = StopReason.END_OF_SEQUENCE

    @property
    def step_index(self) -> int:
        """Place of the next step, from 0."""
        return len(self.trajectory.steps)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request began."""
        return self._clock() - self._started_s

    @property
    def tokens_left(self) -> int:
        """Tokens the solution may still grow by."""
        kept = self.ledger.draft.kept_count + self.ledger.target.kept_count
        return self.request.budgets.max_tokens - kept

    @property
    def may_call_target(self) -> bool:
        """Whether policy and budget let the target write the next step."""
        bound = self.request.budgets.max_target_steps
        within_bound = bound is None or self.target_step_count < bound
        return self.request.policy.may_escalate and within_bound

    def stop_reason(self) -> StopReason | None:
        """Returns why there is no next step; None where there is one."""
        if self.ended is not None:
            return self.ended
        if self.tokens_left <= 0:
            return StopReason.TOTAL_LENGTH
        no_writer = self.request.policy.first_writer is Source.TARGET and not self.may_call_target
        if self.step_index >= self.request.budgets.max_steps or no_writer:
            return StopReason.STEP_LIMIT
        return None

    def step_request(self, source: Source) -> StepRequest:
        """Returns the request for the next step, within what is left of the budgets.

        Raises:
            DeadlineExceeded: no time is left to ask in.
        """
        budgets, policy = self.request.budgets, self.request.policy
        time_left_s = None
        if budgets.time_limit_s is not None:
            time_left_s = budgets.time_limit_s - self.elapsed_s
            if time_left_s <= 0.0:
                raise DeadlineExceeded(f"the time limit of {budgets.time_limit_s:g} s is over")
        return StepRequest(
            self.trajectory,
            max_tokens=min(budgets.max_step_tokens, self.tokens_left),
            sampling=self.request.sampling,
            entropy_token_count=policy.entropy_token_count if source is Source.DRAFT else 0,
            stream_text=self.request.stream_text,
            time_limit_s=time_left_s,
        )

    def repeats(self, step: GeneratedStep) -> bool:
        """Whether a step is the one before it once more."""
        steps = self.trajectory.steps
        # After a step that was cut by its cap, equal text goes on: "1" and "1" make 11.
        return (
            bool(steps)
            and steps[-1].stop_reason is not StopReason.STEP_LENGTH
            and step.text == steps[-1].text
        )

    def is_void(self, step: GeneratedStep) -> bool:
        """Whether a step brings nothing: no text, or that of the step before."""
        # Blanks on which the cap fell may be the middle of a line; only no text at all is nothing.
        is_blank_middle = step.is_cut and bool(step.text)
        return (step.is_empty and not is_blank_middle) or self.repeats(step)


class _Turn:
    """One step's way from proposal to commit."""

    def __init__(self, run: _Run) -> None:
        self.draft: GeneratedStep | None = None
        self._run = run
        self._target: GeneratedStep | None = None
        self._verdict: Verdict | None = None
        self._degradations: list[Degradation] = []
        self._times_before_s = self._model_times_s()

    @property
    def wants_target(self) -> bool:
        """Whether the target has yet to write the step."""
        if self._verdict is None:
            return True
        return self._verdict.escalate and self._verdict.target_step is None

    async def write_draft(self) -> AsyncGenerator[TokenDelta, None]:
        """Lets the draft propose. Without a draft the target writes the step."""
        try:
            async with aclosing(self._write(Source.DRAFT)) as items:
                async for item in items:
                    if isinstance(item, TokenDelta):
                        yield item
                    else:
                        self.draft = item
        except DraftUnavailable:
            if not self._run.may_call_target:
                raise
            self._degradations.append(Degradation.DRAFT_UNAVAILABLE)

    async def judge(self, draft: GeneratedStep) -> None:
        """Decides on the draft's step, by the policy where there is something to decide."""
        run = self._run
        if draft.is_empty and draft.stop_reason is StopReason.END_OF_SEQUENCE:
            # The draft says that the solution was finished one step ago: no step, no verdict.
            self._verdict = Verdict(escalate=False)
            return
        if run.is_void(draft):
            # Nothing to judge: the target gets one try, where it may be called at all.
            self._verdict = Verdict(escalate=run.may_call_target)
        elif run.request.policy.may_escalate and not run.may_call_target:
            self._degradations.append(Degradation.TARGET_BUDGET)
            self._verdict = Verdict(escalate=False)
            return
        else:
            self._verdict = await self._ask_policy(draft)
        run.ledger.routed_step_count += 1

    async def write_target(self) -> AsyncGenerator[TokenDelta, None]:
        """Lets the target write the step. Without a target the draft's stands, where allowed."""
        run, draft = self._run, self.draft
        try:
            async with aclosing(self._write(Source.TARGET)) as items:
                async for item in items:
                    if isinstance(item, TokenDelta):
                        yield item
                    else:
                        self._target = item
        except TargetUnavailable:
            if not run.request.allow_degraded or draft is None:
                raise
            self._degradations.append(Degradation.TARGET_UNAVAILABLE)

    def commit(self) -> StepCommitted | None:
        """Puts the decided step on the trajectory; None where it brings nothing and ends it."""
        run, verdict = self._run, self._verdict
        escalated = verdict is not None and verdict.escalate
        written, source = self.draft, Source.DRAFT
        if self._target is not None:
            written, source = self._target, Source.TARGET
            run.ledger.escalation_count += escalated
        if written is None:
            raise Internal("a turn ended with neither a draft nor a target step")
        if run.is_void(written):
            ended = written.is_empty and written.stop_reason is StopReason.END_OF_SEQUENCE
            run.ended = StopReason.END_OF_SEQUENCE if ended else StopReason.REPETITION
            self._settle(None, source)
            return None
        self._settle(written, source)
        return self._append(written, source)

    def cancel(self, reason: StopReason) -> None:
        """Ends the request in the middle of a step; what the turn decoded was for nothing."""
        ledger, verdict = self._run.ledger, self._verdict
        if verdict is not None and verdict.escalate:
            # The draft's step was through and rejected, and the target was asked for its own.
            ledger.draft.discard_pending()
            ledger.escalation_count += 1
        ledger.cancel_pending()
        self._run.ended = reason

    async def _write(self, source: Source) -> AsyncGenerator[TokenDelta | GeneratedStep, None]:
        run = self._run
        models = run.models
        generator = models.draft if source is Source.DRAFT else models.target
        async with aclosing(generator.generate_step(run.step_request(source))) as items:
            async for item in items:
                if isinstance(item, str):
                    yield TokenDelta(run.step_index, source, item)
                elif item.stop_reason is StopReason.DEADLINE:
                    raise DeadlineExceeded("the time limit was over before the step was")
                else:
                    yield item

    async def _ask_policy(self, draft: GeneratedStep) -> Verdict:
        request = self._run.request
        try:
            verdict = await request.policy.decide(
                self._run.step_request(Source.TARGET), draft, self._run.models
            )
            if verdict.is_load_priced:
                self._degradations.append(Degradation.LOAD_PRICED_THRESHOLD)
            if verdict.escalate and verdict.target_step is not None:
                if self._run.is_void(verdict.target_step):
                    # A policy that has seen the target's step does not take nothing for it.
                    return replace(verdict, escalate=False)
                self._target = verdict.target_step
            return verdict
        except TargetUnavailable:
            if not request.allow_degraded:
                raise
            self._degradations.append(Degradation.TARGET_UNAVAILABLE)
            return Verdict(escalate=False)
        except RouterUnavailable:
            if request.router_fallback is RouterFallback.FAIL:
                raise
            self._degradations.append(Degradation.ROUTER_UNAVAILABLE)
            return Verdict(escalate=request.router_fallback is RouterFallback.ESCALATE)

    def _settle(self, kept: GeneratedStep | None, source: Source) -> None:
        ledger = self._run.ledger
        if kept is not None:
            (ledger.draft if source is Source.DRAFT else ledger.target).keep(kept)
        ledger.discard_pending()

    def _append(self, written: GeneratedStep, source: Source) -> StepCommitted:
        run = self._run
        step = Step(written.text, source, written.stop_reason)
        step_index = run.step_index
        run.add(step)
        run.ledger.step_count += 1
        run.ledger.degraded_step_count += bool(self._degradations)
        draft_s, decision_s, target_s = (
            after - before
            for before, after in zip(self._times_before_s, self._model_times_s(), strict=True)
        )
        return StepCommitted(
            step_index=step_index,
            step=step,
            token_count=written.token_count,
            writer=written.model,
            verdict=self._verdict,
            degradations=tuple(self._degradations),
            draft_time_s=draft_s,
            decision_time_s=decision_s,
            target_time_s=target_s,
            elapsed_s=run.elapsed_s,
        )

    def _model_times_s(self) -> tuple[float, float, float]:
        ledger = self._run.ledger
        decision_s = ledger.router.time_s + ledger.prm.time_s
        return ledger.draft.time_s, decision_s, ledger.target.time_s
