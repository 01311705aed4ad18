"""A call as its transport sees it. No I/O: what to send, how long to wait, whether to try again.

The sync and the async client move messages; everything they have to decide is decided here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict
from uuid import uuid4

import grpc

from arbitrage.core.errors import (
    ArbitrageError,
    DeadlineExceeded,
    FieldInvalid,
    Internal,
    NotServing,
    SessionStoreAway,
    SessionStoreUnavailable,
    Unavailable,
)
from arbitrage.core.events import DraftProposed, Event, Finished, StepCommitted, TokenDelta
from arbitrage.core.ledger import Ledger
from arbitrage.core.steps import GREEDY, SEPARATOR, Sampling, Source, StopReason
from arbitrage.host_port import is_host_and_port
from arbitrage.policy_specs import Arbitrage, PolicySpec
from arbitrage.request import BudgetSpec, Problem, build_request
from arbitrage.status import from_rpc_error
from arbitrage.v1 import orchestrator_pb2
from arbitrage.wire import event_from_proto

_FIRST_RETRY_DELAY_S = 0.2
_LONGEST_RETRY_DELAY_S = 2.0
_DEFAULT_TIMEOUT_S = 600.0
# A request that runs into its own time limit ends with `Finished`, so the call must outlast it.
_GRACE_S = 10.0


# Names that gRPC knows how to look up, beside host:port.
_RESOLVED_BY_GRPC = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "xds:")


class RequestOptions(TypedDict, total=False):
    """What may be said about a request beside its problem.

    `policy` is `Arbitrage()` where it is left out. `timeout_s` bounds the whole call, retries
    included; by default it is the time limit of `budgets` and some grace, or ten minutes.
    `request_id` names the request, so that another process can ask for the same solution; by
    default the client makes one up, to resume what breaks off.
    """

    policy: PolicySpec
    budgets: BudgetSpec
    sampling: Sampling
    allow_degraded: bool
    stream_text: bool
    timeout_s: float
    request_id: str


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
    joined = JoinedSteps()
    text = "".join(joined.add(step) for step in steps)
    return Solution(text, tuple(steps), finished.stop_reason, finished.ledger)


class Addresses:
    """Where orchestrators listen. All calls of a client go to the one that answered last."""

    def __init__(self, given: str | Sequence[str]) -> None:
        parts = given.split(",") if isinstance(given, str) else given
        self.all = tuple(part.strip() for part in parts if part.strip())
        if not self.all:
            raise FieldInvalid("address", repr(given), "names nobody", "give host:port")
        for part in self.all:
            if not (is_host_and_port(part) or part.startswith(_RESOLVED_BY_GRPC)):
                raise FieldInvalid(
                    "address",
                    part,
                    "is no host:port with a port from 1 to 65535",
                    "give host:port without http://, or a name of gRPC's such as unix:/path",
                )
        self.current = self.all[0]

    def next_after(self, failed: str) -> None:
        """Goes on to the next one, unless another call has done so."""
        if failed == self.current:
            place = self.all.index(failed) + 1
            self.current = self.all[place % len(self.all)]


class Attempts:
    """How often a call may still be made, where, and until when."""

    def __init__(
        self,
        addresses: Addresses,
        retries: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._addresses = addresses
        self._retries = self._retries_left = retries
        # The others are asked at once; only a second round waits.
        self._untried_count = len(addresses.all) - 1
        self._retry_delay_s = _FIRST_RETRY_DELAY_S
        self._address = addresses.current
        self._clock = clock
        self._timeout_s = timeout_s
        self._deadline_s = clock() + timeout_s

    def address(self) -> str:
        """Returns where the next try goes."""
        self._address = self._addresses.current
        return self._address

    def progressed(self) -> None:
        """Forgets earlier failures: the call has got further."""
        self._retries_left, self._retry_delay_s = self._retries, _FIRST_RETRY_DELAY_S
        self._untried_count = len(self._addresses.all) - 1

    def time_left_s(self) -> float:
        """Returns the seconds until the deadline, never below 0."""
        return max(0.0, self._deadline_s - self._clock())

    def failed(self, rpc_error: grpc.RpcError, *, may_repeat: bool = True) -> float:
        """Returns the seconds to wait before the next try.

        Raises:
            ArbitrageError: there is none; the class that stands for the error's reason.
        """
        error = self._typed(rpc_error)
        may_help = may_repeat and isinstance(error, Unavailable)
        if may_help and self._untried_count > 0 and self.time_left_s() > 0.0:
            self._untried_count -= 1
            self._addresses.next_after(self._address)
            return 0.0
        delay_s = self._retry_delay_s
        if not may_help or self._retries_left <= 0 or delay_s >= self.time_left_s():
            raise error from rpc_error
        self._retries_left -= 1
        self._retry_delay_s = min(_LONGEST_RETRY_DELAY_S, 2 * delay_s)
        self._addresses.next_after(self._address)
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
    """One `GenerateSolution` as its transport sees it: what to send, what to make of the answer.

    A stream that breaks is resumed by its `request_id` after the steps that came, once per step;
    what is decoded again is not told again.
    """

    def __init__(
        self,
        addresses: Addresses,
        retries: int,
        problem: Problem,
        options: RequestOptions,
        *,
        is_resumable: bool = True,
    ) -> None:
        budgets = options.get("budgets", BudgetSpec())
        self.request = build_request(
            problem,
            options.get("policy", Arbitrage()),
            budgets=budgets,
            sampling=options.get("sampling", GREEDY),
            allow_degraded=options.get("allow_degraded", False),
            stream_text=options.get("stream_text", False),
            request_id=options.get("request_id"),
        )
        # An id of our own is a wish: where sessions are not kept, or their store is away, the
        # request is served without it.
        self._is_id_ours = is_resumable and "request_id" not in options
        if self._is_id_ours:
            self.request.request_id = uuid4().hex
        limit_s = budgets.time_limit_s
        default_s = _DEFAULT_TIMEOUT_S if limit_s is None else limit_s + _GRACE_S
        self.attempts = Attempts(addresses, retries, options.get("timeout_s", default_s))
        self._story = _Story()
        self.deployment_keeps_sessions = True
        self._has_begun = False
        self._broken_at: int | None = None

    @property
    def is_resumable(self) -> bool:
        """Whether a stream that breaks can be gone on with."""
        return self.request.HasField("request_id")

    def received(self, message: orchestrator_pb2.GenerateSolutionResponse) -> Event | None:
        """Returns the event in a message; None where its news was told before the stream broke.

        Raises:
            Internal: it comes after `finished`, out of order, or is of a kind this client does not
                know.
        """
        self._has_begun = True
        event = event_from_proto(message)
        if isinstance(event, StepCommitted):
            self.attempts.progressed()
        return self._story.news(event)

    def ended(self) -> None:
        """Checks that a stream that ended without an error was complete.

        Raises:
            Internal: `finished` is missing.
        """
        if not self._story.is_finished:
            raise Internal("the server ended the stream without `finished`")

    def failed(self, rpc_error: grpc.RpcError) -> float:
        """Returns the seconds to wait before the next try; raises as `Attempts.failed` does.

        Without a session there is none after the first event: steps would be decoded and paid for
        twice.
        """
        has_begun, self._has_begun = self._has_begun, False
        if self._is_id_ours and not self._story.has_begun:
            known = from_rpc_error(rpc_error)
            self.deployment_keeps_sessions = not isinstance(known, SessionStoreUnavailable)
            if isinstance(known, SessionStoreUnavailable | SessionStoreAway):
                self._is_id_ours = False
                self.request.ClearField("request_id")
                return 0.0
        step_count = self._story.step_count
        may_repeat = not self._story.has_begun or self.is_resumable
        if has_begun:
            may_repeat = may_repeat and self._broken_at != step_count
            self._broken_at = step_count
        delay_s = self.attempts.failed(rpc_error, may_repeat=may_repeat)
        self.request.resume_after_step = step_count
        self._story.retold()
        return delay_s


class _Story:
    """What a caller has been told of a solution, so that nothing is told twice."""

    def __init__(self) -> None:
        self.step_count = 0
        self.has_begun = False
        self.is_finished = False
        self._is_proposed = False
        # Text of the step under way by who wrote it: as it was told, and as it comes again.
        self._told: dict[Source, str] = {}
        self._come: dict[Source, str] = {}

    def retold(self) -> None:
        """Expects the step under way to be told from its beginning."""
        self._come = {}

    def news(self, event: Event) -> Event | None:
        """Returns what of an event is new."""
        if self.is_finished:
            raise Internal("the server sent an event after `finished`")
        self.has_begun = True
        match event:
            case DraftProposed():
                was_proposed, self._is_proposed = self._is_proposed, True
                return None if was_proposed else event
            case TokenDelta():
                return self._new_text(event)
            case StepCommitted():
                if event.step_index != self.step_count:
                    raise Internal(
                        f"the server sent step {event.step_index} where {self.step_count} was next"
                    )
                self.step_count += 1
                self._is_proposed = False
                self._told, self._come = {}, {}
            case Finished():
                self.is_finished = True
        return event

    def _new_text(self, delta: TokenDelta) -> TokenDelta | None:
        source = delta.source
        told, come = self._told.get(source, ""), self._come.get(source, "") + delta.text
        self._come[source] = come
        # What was told cannot be taken back; where it comes otherwise, the step will say so.
        if len(come) <= len(told) or not come.startswith(told):
            return None
        self._told[source] = come
        return replace(delta, text=come[len(told) :])


class JoinedSteps:
    """Says what each step adds to the text of a solution."""

    def __init__(self) -> None:
        self._gap = ""

    def add(self, committed: StepCommitted) -> str:
        """Returns the step's text, with the separator before it where one belongs there."""
        piece = self._gap + committed.step.text
        # A step that was cut by its token cap is continued by the next one.
        is_cut = committed.step.stop_reason is StopReason.STEP_LENGTH
        self._gap = "" if is_cut else SEPARATOR
        return piece
