"""Finds what is wrong with bytes that are not the message they should be.

protobuf says only that parsing failed. This walks the wire format beside the descriptor and names
the field, such as `steps[2].text`. It runs for refused messages alone, so it may be slow; but the
event loop waits for it, so a long message is refused without the search.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from arbitrage.core.errors import MalformedMessage

_LENGTH_DELIMITED = 2
# Measured at 0.9 s per MiB of the smallest steps: one message of 16 MiB would stop every call for
# fourteen seconds.
_SEARCHED_BYTES = 128 << 10
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
    broken = None
    if len(received) <= _SEARCHED_BYTES:
        broken = _broken_field(descriptor, received, "")
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


def _broken_field(descriptor: Any, received: bytes, path: str) -> tuple[str, bytes | None] | None:
    """Returns path and bytes of the first broken field; None where no field can be blamed."""
    try:
        # A message without fields of its own keeps everything it is given as unknown fields.
        fields: Any = UnknownFieldSet(Empty.FromString(received))
    except DecodeError:
        return (path, None) if path else None
    seen: Counter[int] = Counter()
    for found in fields:
        field = descriptor.fields_by_number.get(found.field_number)
        if field is None or found.wire_type != _LENGTH_DELIMITED:
            continue
        index = seen[field.number]
        seen[field.number] += 1
        name = f"{path}.{field.name}" if path else field.name
        if field.is_repeated:
            name = f"{name}[{index}]"
        broken = _broken_value(field, found.data, name)
        if broken is not None:
            return broken
    return None


def _broken_value(
    field: FieldDescriptor, value: bytes, path: str
) -> tuple[str, bytes | None] | None:
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            value.decode("utf-8")
        except UnicodeDecodeError:
            return path, value
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        return _broken_field(field.message_type, value, path)
    return None
