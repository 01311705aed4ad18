"""Bytes that are not the message: the field at fault is named, however deep it lies."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from arbitrage.core.errors import MalformedMessage
from arbitrage.v1.generator_pb2 import GenerateStepRequest
from arbitrage.v1.orchestrator_pb2 import Chat, ChatMessage, GenerateSolutionRequest
from arbitrage.v1.trajectory_pb2 import Step
from services.rpc.malformed import _Walk, parse

BAD = b"ok\xffno"
STAND_IN = "*****"
SEVERAL = [Step(text="a"), Step(text="b"), Step(text=STAND_IN)]
TURNS = [ChatMessage(content="hello"), ChatMessage(content=STAND_IN)]


def spoiled(message: Message) -> bytes:
    """Returns the message's bytes with the stand-in replaced by what is not UTF-8."""
    whole = message.SerializeToString()
    assert len(BAD) == len(STAND_IN)
    assert whole.count(STAND_IN.encode()) == 1
    return whole.replace(STAND_IN.encode(), BAD)


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (GenerateStepRequest(problem=STAND_IN), "problem"),
        (GenerateStepRequest(problem="p", steps=SEVERAL, max_tokens=3), "steps[2].text"),
        (GenerateSolutionRequest(chat=Chat(messages=TURNS)), "chat.messages[1].content"),
        (GenerateSolutionRequest(problem="p", request_id=STAND_IN), "request_id"),
    ],
)
def test_a_text_that_is_not_utf8_is_named_by_its_path(message: Message, path: str) -> None:
    with pytest.raises(MalformedMessage, match="UTF-8") as raised:
        parse(type(message), spoiled(message))
    assert raised.value.field == path
    assert "\\xff" in raised.value.value


def test_a_long_message_is_refused_without_a_search() -> None:
    # Searching 16 MiB of the smallest steps took 14 s, in which no other call was answered.
    message = GenerateStepRequest(steps=[Step(text="a")] * 30_000 + [Step(text=STAND_IN)])
    with pytest.raises(MalformedMessage) as raised:
        parse(GenerateStepRequest, spoiled(message))
    assert raised.value.field == "GenerateStepRequest"


def test_bytes_that_are_no_message_at_all_are_refused_as_such() -> None:
    with pytest.raises(MalformedMessage, match=r"arbitrage\.v1\.GenerateStepRequest"):
        parse(GenerateStepRequest, b"\x0a\xff")


def test_a_broken_message_inside_is_named() -> None:
    # Field 2 (steps) holds one byte that starts a field and never ends it.
    with pytest.raises(MalformedMessage) as raised:
        parse(GenerateStepRequest, b"\x12\x01\x0a")
    assert raised.value.field == "steps[0]"


def test_fields_of_a_newer_version_are_let_through() -> None:
    assert parse(GenerateStepRequest, b"\x0a\x01p\xa2\x06\x02\xff\xfe").problem == "p"


@given(st.binary(max_size=60))
def test_any_bytes_are_either_a_message_or_refused(received: bytes) -> None:
    refused: MalformedMessage | None = None
    try:
        message = parse(GenerateSolutionRequest, received)
    except MalformedMessage as error:
        refused = error
    if refused is None:
        assert isinstance(message, GenerateSolutionRequest)
    else:
        assert refused.field


def test_millions_of_fields_are_not_all_looked_at() -> None:
    looked_at: list[int] = []

    class Watched(dict[int, object]):
        def get(self, number: int, default: object = None) -> object:
            looked_at.append(number)
            return super().get(number, default)

    descriptor = SimpleNamespace(
        fields_by_number=Watched(GenerateStepRequest.DESCRIPTOR.fields_by_number)
    )
    flood = memoryview(b"\x12\x00" * 1_000_000 + b"\x0a\x01\xff")
    assert _Walk().broken_field(descriptor, flood, "") is None
    assert len(looked_at) == 10_000


@pytest.mark.parametrize(
    "received",
    [
        b"\x0a\x7f",
        b"\xff" * 30,
        b"\x09\x01",
        b"\x0d",
        b"\x0b\x0a\x00",
        b"\x0f",
        b"\x0a" + b"\x80" * 9,
    ],
)
def test_bytes_that_end_too_early_are_refused_as_a_whole(received: bytes) -> None:
    with pytest.raises(MalformedMessage, match="GenerateStepRequest"):
        parse(GenerateStepRequest, received + b"\x0a\x01\xff")


@given(st.binary(max_size=60))
def test_no_bytes_are_refused_with_anything_else(received: bytes) -> None:
    with suppress(MalformedMessage):
        parse(GenerateSolutionRequest, received)
