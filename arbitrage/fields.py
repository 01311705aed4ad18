"""Values of a request's fields, checked before a message has to hold them.

protobuf refuses what it cannot hold with a TypeError, ValueError or UnicodeEncodeError that does
not say which field; these say it, and how to mend it.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

from arbitrage.core.errors import BudgetOutOfRange, FieldInvalid, InvalidRequest, MalformedMessage

INT32 = (-(2**31), 2**31 - 1)
UINT32 = (0, 2**32 - 1)
UINT64 = (0, 2**64 - 1)

_Number = TypeVar("_Number", float, float | None)


def text_field(field: str, value: str) -> str:
    """Returns `value`, refused where it is no text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise FieldInvalid(field, value, "must be a str", "give text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        lone = f"U+{ord(value[error.start]):04X} at {error.start}"
        raise MalformedMessage(
            field, lone, "cannot be encoded as UTF-8", "remove the lone surrogate"
        ) from None
    return value


def integer_field(
    refusal: type[InvalidRequest], field: str, value: int, bounds: tuple[int, int]
) -> int:
    """Returns `value`, refused with `refusal` where it is no integer within `bounds`."""
    least, most = bounds
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise refusal(field, value, f"must be an integer from {least} to {most}", "give one")
    return value


def real_field(field: str, value: _Number) -> _Number:
    """Returns `value`, refused where it is neither a number nor None."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise FieldInvalid(field, value, "must be a number", "give one")


def duration_field(field: str, seconds: float) -> Duration:
    """Returns the message for a time in seconds, refused where it is no such time."""
    duration = Duration()
    try:
        # A Duration holds whole nanoseconds and about 10,000 years.
        duration.FromNanoseconds(round(seconds * 1e9))
    except (OverflowError, TypeError, ValueError):
        raise BudgetOutOfRange(
            field, seconds, "must be a number of seconds", "give a time in seconds or leave it out"
        ) from None
    return duration
