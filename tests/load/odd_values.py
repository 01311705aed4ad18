"""Draws odd values from a seed: texts, numbers, JSON, bytes, and messages of any proto type.

Plain draws from one `random.Random`, so that a seed gives the same inputs everywhere and a hundred
thousand of them take seconds.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

MessageT = TypeVar("MessageT", bound=Message)
_ItemT = TypeVar("_ItemT")

LONG_TEXT = "long " * 20_000  # 100 kB
_TEXTS = (
    "",
    " ",
    "\n\n",
    "\t\r\n",
    "\0",
    "a\0b",
    "\x1b[2J\x07\x08",
    "\x7f\x80\x9f",
    "\u202eright to left",
    "\ufeffmarked",
    "\ufffe\uffff\U0010ffff",
    "e\u0301" * 40,
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "١٢٣ １２３",
    "ﬁ ŷ Δ ρ ß İ",
    "1 + 1?",
    "step one\n\nstep two\n\n",
    "<|end|><|start|></s>[SEP]",
    "{}",
    "null",
    "NaN",
    "-1",
    "1e999",
    "0x10",
    "9" * 5_000,
    "../../etc/passwd",
    "/etc/passwd",
    "~nobody-of-that-name/x",
    "C:\\windows",
    ".",
    "..",
    "a/../../b",
    "%s %d {0} {x!r}",
    "n" * 300,
    "redis://:password@127.0.0.1:1/0",
    "memory://x",
    LONG_TEXT,
)
# No protobuf field holds these; JSON, file names and variables may.
_BROKEN_TEXTS = ("\ud800", "a\udfffb", "\udc80\udcff", "\ud83d")
_REALS = (
    math.nan,
    math.inf,
    -math.inf,
    -0.0,
    0.0,
    5e-324,
    1e-45,
    1.1754944e-38,
    3.4028235e38,
    1e308,
    -1e308,
    0.5,
    1.0,
    1.0000001,
    -1.0,
    2.0,
    100.0,
)
_DEEPEST = 4

_INTEGER_BOUNDS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}


class OddValues:
    """Draws values from a seed; equal seeds draw equal values in equal order."""

    def __init__(self, seed: str) -> None:
        self.coin = random.Random(seed)

    def chance(self, probability: float) -> bool:
        """Returns True with that probability."""
        return self.coin.random() < probability

    def one_of(self, items: Sequence[_ItemT]) -> _ItemT:
        """Returns one of the items."""
        return self.coin.choice(items)

    def text(self, *, may_be_broken: bool = False) -> str:
        """Returns an odd text; one that may be broken may hold lone surrogates."""
        coin = self.coin
        if may_be_broken and self.chance(0.1):
            return self.one_of(_BROKEN_TEXTS)
        if self.chance(0.6):
            text = self.one_of(_TEXTS)
            # Long ones are rare, or nothing else would be tried in the time.
            return text if text is not LONG_TEXT or self.chance(0.05) else "short"
        return "".join(chr(self._code_point()) for _ in range(coin.randint(0, 12)))

    def _code_point(self) -> int:
        highest = self.one_of((0x7F, 0xFF, 0x7FF, 0xFFFF, 0x10FFFF))
        point = self.coin.randint(0, highest)
        return 0x20 if 0xD800 <= point <= 0xDFFF else point

    def real(self) -> float:
        """Returns an odd float, often one within [0, 1]."""
        if self.chance(0.4):
            return self.coin.random()
        return self.one_of(_REALS) if self.chance(0.8) else self.coin.uniform(-1e3, 1e3)

    def integer(self, least: int = -(2**63), most: int = 2**64) -> int:
        """Returns an integer within bounds, often at or near one of them, or a small one."""
        near = self.one_of((least, most, 0, 1, 2**31, 2**32, self.coin.randint(least, most)))
        value = near + self.one_of((-1, 0, 0, 1)) if self.chance(0.5) else self.coin.randint(0, 9)
        return min(most, max(least, value))

    def json(self, depth: int = 0) -> Any:
        """Returns what a JSON document may hold."""
        kind = self.coin.randrange(9 if depth < _DEEPEST else 6)
        match kind:
            case 0:
                return self.one_of((None, True, False))
            case 1:
                return self.integer(-(10**30), 10**30)
            case 2:
                return self.real()
            case 3:
                return self.one_of((10**400, -(10**400), 2**63, 1e-320))
            case 4 | 5:
                return self.text(may_be_broken=True)
            case 6:
                return [self.json(depth + 1) for _ in range(self.coin.randint(0, 4))]
            case 7:
                return self.nested()
            case _:
                return {
                    self.text(may_be_broken=True): self.json(depth + 1)
                    for _ in range(self.coin.randint(0, 4))
                }

    def nested(self) -> Any:
        """Returns lists in lists, some of them as deep as an interpreter can just about read."""
        value: Any = []
        for _ in range(self.one_of((1, 30, 300, 600, 850))):
            value = [value]
        return value

    def changed_json(self, good: Any) -> Any:
        """Returns a document with one to three values changed, dropped or added."""
        changed = [good]
        for _ in range(self.coin.randint(1, 3)):
            self._change_one(changed)
        return changed[0]

    def _change_one(self, top: list[Any]) -> None:
        # Containers are copied on the way down: the good document is used again.
        holder: Any = top
        key: Any = 0
        while isinstance(holder[key], dict | list) and holder[key] and self.chance(0.75):
            inner = holder[key]
            holder[key] = inner = dict(inner) if isinstance(inner, dict) else list(inner)
            holder = inner
            key = self.one_of(list(inner) if isinstance(inner, dict) else range(len(inner)))
        match self.coin.randrange(4):
            case 0 if holder is not top:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[self.text(may_be_broken=True)] = self.json()
            case _:
                holder[key] = self.json()

    def changed_bytes(self, good: bytes) -> bytes:
        """Returns bytes of which a few are changed, cut out or put in."""
        changed = bytearray(good)
        for _ in range(self.coin.randint(1, 4)):
            at = self.coin.randrange(len(changed) + 1)
            match self.coin.randrange(4):
                case 0 if at < len(changed):
                    changed[at] = self.coin.randrange(256)
                case 1:
                    del changed[at : at + self.coin.randint(1, 5)]
                case 2:
                    del changed[at:]
                case _:
                    changed[at:at] = self.coin.randbytes(self.coin.randint(1, 5))
        return bytes(changed)

    def message(self, kind: type[MessageT]) -> MessageT:
        """Returns a message whose every field may be odd."""
        message = kind()
        self._fill(message, 0)
        return message

    def changed_message(self, good: MessageT) -> MessageT:
        """Returns a good message with one to three fields made odd, anywhere inside it."""
        changed = type(good)()
        changed.CopyFrom(good)
        for _ in range(self.coin.randint(1, 3)):
            holder = self.one_of(list(_messages_in(changed)))
            fields = list(holder.DESCRIPTOR.fields)
            if fields:
                self._set(holder, self.one_of(fields), 1)
        return changed

    def _fill(self, message: Message, depth: int) -> None:
        for field in message.DESCRIPTOR.fields:
            if self.chance(0.7 if depth < _DEEPEST else 0.2):
                self._set(message, field, depth)

    def _set(self, message: Message, field: Any, depth: int) -> None:
        if field.is_repeated:
            message.ClearField(field.name)
            count = self.one_of((0, 1, 2, 3))
            if self.chance(0.005):
                count = 3_000
            for _ in range(count):
                self._add(message, field, depth)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            inner: Message = getattr(message, field.name)
            inner.SetInParent()
            self._fill(inner, depth + 1)
        else:
            setattr(message, field.name, self._scalar(field))

    def _add(self, message: Message, field: Any, depth: int) -> None:
        values: Any = getattr(message, field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            self._fill(values.add(), depth + 1)
        else:
            values.append(self._scalar(field))

    def _scalar(self, field: Any) -> Any:
        match field.type:
            case FieldDescriptor.TYPE_STRING:
                return self.text()
            case FieldDescriptor.TYPE_BYTES:
                return self.coin.randbytes(self.coin.randint(0, 20))
            case FieldDescriptor.TYPE_BOOL:
                return self.chance(0.5)
            case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
                return self.real()
            case FieldDescriptor.TYPE_ENUM:
                known = [value.number for value in field.enum_type.values]
                return self.one_of((*known, *known, 99, -1, 2**31 - 1, -(2**31)))
            case kind:
                return self.integer(*_INTEGER_BOUNDS[kind])


def _messages_in(message: Message) -> list[Message]:
    """Returns a message and those that are set inside it, at any depth."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE and not _is_map(field):
            inner: Any = value if field.is_repeated else [value]
            for one in inner:
                found += _messages_in(one)
    return found


def _is_map(field: Any) -> bool:
    return bool(field.message_type.GetOptions().map_entry)


def document(odd: OddValues, good: Any) -> bytes:
    """Returns a JSON document: a good one changed, an odd one, or what only looks like one."""
    match odd.coin.choices(("changed", "odd", "bytes", "deep", "number"), (70, 15, 12, 1, 2))[0]:
        case "changed":
            return json.dumps(odd.changed_json(good)).encode()
        case "odd":
            return json.dumps(odd.json()).encode()
        case "bytes":
            return odd.changed_bytes(json.dumps(good).encode())
        case "deep":
            return b'{"format_version": 1, "x": ' + b"[" * 100_000
        case _:
            key = odd.one_of([key for key in good if isinstance(good[key], int | float)] or ["x"])
            return json.dumps({**good, key: 0}).encode().replace(b": 0", b": " + b"9" * 5_000, 1)
