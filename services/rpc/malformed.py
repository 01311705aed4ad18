"""Finds what is wrong with bytes that are not the message they should be.

protobuf says only that parsing failed. This walks the wire format beside the descriptor and names
the field, such as `steps[2].text`. It runs on the event loop, so it looks at no more fields than
take a moment: a message may hold millions of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from arbitrage.core.errors import MalformedMessage

_MOST_FIELDS = 10_000
_VARINT, _FIXED_64, _LENGTH_DELIMITED, _FIXED_32 = 0, 1, 2, 5
_MessageT = TypeVar("_MessageT", bound=Message)


def parse(kind: type[_MessageT], received: bytes) -> _MessageT:
    """Returns the message that `received` holds.

    Raises:
        MalformedMessage: naming the field that is broken, as far as it can be found.
    """
    try:
        return kind.FromString(received)
    except DecodeError:
        raise _refusal(kind.DESCRIPTOR, received) from None


def _refusal(descriptor: Any, received: bytes) -> MalformedMessage:
    broken = _Walk().broken_field(descriptor, memoryview(received), "")
    if broken is None:
        return MalformedMessage(
            descriptor.name,
            f"{len(received)} bytes",
            f"is not a {descriptor.full_name}",
            "send this message as the proto files define it",
        )
    path, text = broken
    if text is None:
        return MalformedMessage(
            path, f"{len(received)} bytes", "cannot be parsed", "send what the proto files define"
        )
    return MalformedMessage(
        path, ascii(text[:24]), "is not valid UTF-8", "encode the text as UTF-8"
    )


class _Walk:
    """One look at a message and those inside it, which share its bound on fields."""

    def __init__(self) -> None:
        self._fields_left = _MOST_FIELDS

    def broken_field(
        self, descriptor: Any, received: memoryview, path: str
    ) -> tuple[str, bytes | None] | None:
        """Returns path and bytes of the first broken field; None where no field can be blamed."""
        seen: Counter[int] = Counter()
        try:
            for number, value in _fields(received):
                if self._fields_left == 0:
                    return None
                self._fields_left -= 1
                field = descriptor.fields_by_number.get(number)
                if field is None or value is None:
                    continue
                index = seen[number]
                seen[number] += 1
                name = f"{path}.{field.name}" if path else field.name
                if field.is_repeated:
                    name = f"{name}[{index}]"
                broken = self._broken_value(field, value, name)
                if broken is not None:
                    return broken
        except ValueError:
            return (path, None) if path else None
        return None

    def _broken_value(
        self, field: FieldDescriptor, value: memoryview, path: str
    ) -> tuple[str, bytes | None] | None:
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                str(value, "utf-8")
            except UnicodeDecodeError:
                return path, bytes(value)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            return self.broken_field(field.message_type, value, path)
        return None


def _fields(received: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """Yields the number of each field, and its bytes where it is delimited by a length.

    Raises:
        ValueError: the next field has no end, or is a group, which no message here has.
    """
    at = 0
    while at < len(received):
        tag, at = _varint(received, at)
        start, kind = at, tag & 7
        if kind == _VARINT:
            _, at = _varint(received, at)
        elif kind == _FIXED_64:
            at += 8
        elif kind == _FIXED_32:
            at += 4
        elif kind == _LENGTH_DELIMITED:
            length, start = _varint(received, at)
            at = start + length
        else:
            raise ValueError("a group")
        if at > len(received):
            raise ValueError("no end")
        yield tag >> 3, received[start:at] if kind == _LENGTH_DELIMITED else None


def _varint(received: memoryview, at: int) -> tuple[int, int]:
    """Returns the integer that begins at `at`, and where it ends."""
    value = 0
    for index, byte in enumerate(received[at : at + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("no end")
