"""Everything that can go wrong with a request, as one tree.

ArbitrageError
├── InvalidRequest                 bad input: names field, value and fix
│   ├── MalformedMessage
│   ├── ProblemEmpty
│   ├── ProblemTooLarge
│   ├── PolicyUnknown
│   ├── ThresholdOutOfRange
│   ├── BudgetOutOfRange
│   ├── SamplingOutOfRange
│   ├── FieldInvalid
│   └── ContextTooLong
├── PreconditionFailed             good input that this deployment cannot serve
│   ├── SessionStoreUnavailable
│   ├── SessionNotFound
│   └── CalibrationUnavailable
├── Unauthenticated                the caller does not say who they are
├── PermissionDenied               the caller may not do that
├── Overloaded                     come back after `retry_after_s`
│   └── QuotaExceeded
├── Unavailable                    nobody there to answer
│   ├── ModelUnavailable
│   │   ├── DraftUnavailable
│   │   ├── TargetUnavailable
│   │   ├── PrmUnavailable
│   │   └── RouterUnavailable
│   ├── SessionStoreAway
│   ├── SessionTaken               another call goes on with the session
│   └── NotServing
├── DeadlineExceeded
├── Cancelled
└── Internal

Each leaf has one `reason`: the name of its `arbitrage.v1.ErrorReason` without the prefix. Services
raise these, one table turns them into statuses, and the client raises the same classes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from arbitrage.core.shown import one_line


class ArbitrageError(Exception):
    """Base of every error of this product."""

    reason: ClassVar[str] = "UNSPECIFIED"


class InvalidRequest(ArbitrageError):
    """A field holds a value that cannot be used.

    The message reads `field: what is wrong; fix`, with the value shortened to what a log can bear.
    """

    def __init__(self, field: str, value: object, problem: str, fix: str) -> None:
        self.field = field
        self.value = one_line(value if isinstance(value, str) else repr(value))
        self.problem = problem
        self.fix = fix
        super().__init__(f"{field}: {problem}, got {self.value}; {fix}")


class MalformedMessage(InvalidRequest):
    """The bytes are not the message they should be."""

    reason = "MALFORMED_MESSAGE"


class ProblemEmpty(InvalidRequest):
    """The problem holds no text."""

    reason = "PROBLEM_EMPTY"


class ProblemTooLarge(InvalidRequest):
    """The problem is longer than the server takes."""

    reason = "PROBLEM_TOO_LARGE"


class PolicyUnknown(InvalidRequest):
    """No policy, or one this server does not offer."""

    reason = "POLICY_UNKNOWN"


class ThresholdOutOfRange(InvalidRequest):
    """A threshold, rate or share lies outside its range."""

    reason = "THRESHOLD_OUT_OF_RANGE"


class BudgetOutOfRange(InvalidRequest):
    """A step, token, target-step or time budget cannot be kept."""

    reason = "BUDGET_OUT_OF_RANGE"


class SamplingOutOfRange(InvalidRequest):
    """A sampling value lies outside its range."""

    reason = "SAMPLING_OUT_OF_RANGE"


class FieldInvalid(InvalidRequest):
    """Any other field whose value cannot be used."""

    reason = "FIELD_INVALID"


class ContextTooLong(InvalidRequest):
    """The prompt does not fit the model's context."""

    reason = "CONTEXT_TOO_LONG"


class PreconditionFailed(ArbitrageError):
    """The request is good, but this deployment cannot serve it."""


class SessionStoreUnavailable(PreconditionFailed):
    """`request_id` needs a session store that orchestrators share."""

    reason = "SESSION_STORE_UNAVAILABLE"


class SessionNotFound(PreconditionFailed):
    """No session holds the steps that the caller says it has."""

    reason = "SESSION_NOT_FOUND"


class CalibrationUnavailable(PreconditionFailed):
    """`target_share` needs a router with a calibration table."""

    reason = "CALIBRATION_UNAVAILABLE"


class Unauthenticated(ArbitrageError):
    """The call needs an API key that is good."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(ArbitrageError):
    """The caller is known, and may not do that."""

    reason = "PERMISSION_DENIED"


class Overloaded(ArbitrageError):
    """The queue is full; nothing was started."""

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class QuotaExceeded(Overloaded):
    """The tenant has used up what it may in a minute; nothing was started."""

    reason = "QUOTA_EXCEEDED"


class Unavailable(ArbitrageError):
    """Nobody there to answer; the same call may succeed later."""


class ModelUnavailable(Unavailable):
    """A model service cannot be reached."""


class DraftUnavailable(ModelUnavailable):
    """The draft cannot be reached."""

    reason = "DRAFT_UNAVAILABLE"


class TargetUnavailable(ModelUnavailable):
    """The target cannot be reached."""

    reason = "TARGET_UNAVAILABLE"


class PrmUnavailable(ModelUnavailable):
    """The process reward model cannot be reached."""

    reason = "PRM_UNAVAILABLE"


class RouterUnavailable(ModelUnavailable):
    """The router cannot be reached."""

    reason = "ROUTER_UNAVAILABLE"


class SessionStoreAway(Unavailable):
    """The session store cannot be reached now."""

    reason = "SESSION_STORE_AWAY"


class SessionTaken(Unavailable):
    """Another call goes on with this session; the same call again follows it."""

    reason = "SESSION_TAKEN"


class NotServing(Unavailable):
    """The server is starting or stopping."""

    reason = "NOT_SERVING"


class DeadlineExceeded(ArbitrageError):
    """The call's deadline passed."""

    reason = "DEADLINE_EXCEEDED"


class Cancelled(ArbitrageError):
    """The caller cancelled."""

    reason = "CANCELLED"


class Internal(ArbitrageError):
    """A defect of the server; its log has the trace."""

    reason = "INTERNAL"


def leaves(root: type[ArbitrageError] = ArbitrageError) -> Iterator[type[ArbitrageError]]:
    """Yields every class of the tree that has a reason of its own."""
    if "reason" in vars(root) and root is not ArbitrageError:
        yield root
    for child in root.__subclasses__():
        yield from leaves(child)
