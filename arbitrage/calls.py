"""A call as its transport sees it. No I/O: what to send, how long to wait, whether to try again.

The sync and the async client move messages; everything they have to decide is decided here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypedDict

import grpc

from arbitrage.core.errors import (
    ArbitrageError,
    DeadlineExceeded,
    Internal,
    NotServing,
    Unavailable,
)
from arbitrage.core.events import Event, Finished, StepCommitted
from arbitrage.core.ledger import Ledger
from arbitrage.core.steps import GREEDY, SEPARATOR, Sampling, StopReason
from arbitrage.policy_specs import Arbitrage, PolicySpec
from arbitrage.request import BudgetSpec, Problem, build_request
from arbitrage.status import from_rpc_error
from arbitrage.v1 import orchestrator_pb2
from arbitrage.wire import event_from_proto

_FIRST_RETRY_DELAY_S = 0.2
_DEFAULT_TIMEOUT_S = 600.0
# A request that runs into its own time limit ends with `Finished`, so the call must outlast it.
_GRACE_S = 10.0


class RequestOptions(TypedDict, total=False):
    """What may be said about a request beside its problem.

    `policy` is `Arbitrage()` where it is left out. `timeout_s` bounds the whole call, retries
    included; by default it is the time limit of `budgets` and some grace, or ten minutes.
    """

    policy: PolicySpec
    budgets: BudgetSpec
    sampling: Sampling
    allow_degraded: bool
    stream_text: bool
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Solution:
    """A finished solution: its text, its steps with their provenance, and what it cost."""

    text: str
    steps: tuple[StepCommitted, ...]
    stop_reason: StopReason
    ledger: Ledger

    @property
    def escalation_rate(self) -> float:
        """Share of routed steps that were escalated; 0 where none was routed."""
        return self.ledger.escalation_rate


def solution_of(events: Iterable[Event]) -> Solution:
    """Returns what a stream that ended well amounts to.

    Raises:
        Internal: `Finished` is missing.
    """
    steps: list[StepCommitted] = []
    finished: Finished | None = None
    # To the very end: a stream that is left after `Finished` is cancelled before its OK status.
    for event in events:
        if isinstance(event, StepCommitted):
            steps.append(event)
        elif isinstance(event, Finished):
            finished = event
    if finished is None:
        raise Internal("a solution's stream ended without `finished`")
    return Solution(_text_of(steps), tuple(steps), finished.stop_reason, finished.ledger)


class Attempts:
    """How often a call may still be made, and until when."""

    def __init__(
        self,
        address: str,
        retries: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._retries_left = retries
        self._retry_delay_s = _FIRST_RETRY_DELAY_S
        self._clock = clock
        self._timeout_s = timeout_s
        self._deadline_s = clock() + timeout_s

    def time_left_s(self) -> float:
        """Returns the seconds until the deadline, never below 0."""
        return max(0.0, self._deadline_s - self._clock())

    def failed(self, rpc_error: grpc.RpcError, *, may_repeat: bool = True) -> float:
        """Returns the seconds to wait before the next try.

        Raises:
            ArbitrageError: there is none; the class that stands for the error's reason.
        """
        error = self._typed(rpc_error)
        delay_s = self._retry_delay_s
        may_help = may_repeat and isinstance(error, Unavailable)
        if not may_help or self._retries_left <= 0 or delay_s >= self.time_left_s():
            raise error from rpc_error
        self._retries_left -= 1
        self._retry_delay_s *= 2
        return delay_s

    def _typed(self, rpc_error: grpc.RpcError) -> ArbitrageError:
        error = from_rpc_error(rpc_error)
        if isinstance(error, NotServing):
            # Whoever reads this has to know which of their addresses is meant.
            return NotServing(f"{self._address}: {error}")
        if isinstance(error, DeadlineExceeded):
            return DeadlineExceeded(
                f"{self._address} had not finished within {self._timeout_s:g} s; give it more time "
                "with timeout_s, or bound the solution with a time limit"
            )
        return error


class SolutionCall:
    """One `GenerateSolution` as its transport sees it: what to send, what to make of the answer."""

    def __init__(
        self, address: str, retries: int, problem: Problem, options: RequestOptions
    ) -> None:
        budgets = options.get("budgets", BudgetSpec())
        self.request = build_request(
            problem,
            options.get("policy", Arbitrage()),
            budgets=budgets,
            sampling=options.get("sampling", GREEDY),
            allow_degraded=options.get("allow_degraded", False),
            stream_text=options.get("stream_text", False),
        )
        limit_s = budgets.time_limit_s
        default_s = _DEFAULT_TIMEOUT_S if limit_s is None else limit_s + _GRACE_S
        self.attempts = Attempts(address, retries, options.get("timeout_s", default_s))
        self._is_started = False
        self._is_finished = False

    def received(self, message: orchestrator_pb2.GenerateSolutionResponse) -> Event:
        """Returns the event in a message.

        Raises:
            Internal: it comes after `finished`, or is of a kind this client does not know.
        """
        if self._is_finished:
            raise Internal("the server sent an event after `finished`")
        self._is_started = True
        event = event_from_proto(message)
        self._is_finished = isinstance(event, Finished)
        return event

    def ended(self) -> None:
        """Checks that a stream that ended without an error was complete.

        Raises:
            Internal: `finished` is missing.
        """
        if not self._is_finished:
            raise Internal("the server ended the stream without `finished`")

    def failed(self, rpc_error: grpc.RpcError) -> float:
        """Returns the seconds to wait before the next try; raises as `Attempts.failed` does.

        After the first event there is none: steps would be decoded and paid for twice.
        """
        return self.attempts.failed(rpc_error, may_repeat=not self._is_started)


def _text_of(steps: Iterable[StepCommitted]) -> str:
    text, gap = "", ""
    for committed in steps:
        text += gap + committed.step.text
        # A step that was cut by its token cap is continued by the next one.
        gap = "" if committed.step.stop_reason is StopReason.STEP_LENGTH else SEPARATOR
    return text
