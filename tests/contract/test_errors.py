"""Every reason has one code, one class and one sentence, and survives the wire."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from arbitrage.core.errors import (
    ArbitrageError,
    FieldInvalid,
    Internal,
    InvalidRequest,
    NotServing,
    Overloaded,
    PrmUnavailable,
    ProblemEmpty,
    TargetUnavailable,
    leaves,
)
from arbitrage.status import CODES, DETAILS_KEY, DOMAIN, from_rpc_error, from_status, to_status
from arbitrage.v1.error_reason_pb2 import ErrorReason

PROTO = Path(__file__).parents[2] / "protos" / "arbitrage" / "v1" / "error_reason.proto"
REASONS = [name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()[1:]]
LEAVES = list(leaves())


class FailedCall(grpc.RpcError):
    """A call that ended with a status and this metadata."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Any = ()) -> None:
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata


def made(kind: type[ArbitrageError]) -> ArbitrageError:
    """Returns an error of that class with something in every field."""
    if issubclass(kind, InvalidRequest):
        return kind("steps[2].text", "x" * 200, "is wrong", "mend it")
    if issubclass(kind, Overloaded):
        return kind("full", retry_after_s=2.25)
    return kind("what happened")


def test_every_reason_of_the_proto_has_a_code_and_exactly_one_class() -> None:
    assert sorted(CODES) == sorted(REASONS)
    assert sorted(kind.reason for kind in LEAVES) == sorted(REASONS)


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_is_documented_with_the_code_it_is_sent_with(reason: str) -> None:
    comment = re.search(rf"// (\w+): [^\n]+\n  ERROR_REASON_{reason} = ", PROTO.read_text())
    assert comment is not None
    assert comment[1] == CODES[reason].name


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_every_error_is_the_same_after_it_was_a_status(kind: type[ArbitrageError]) -> None:
    error = made(kind)
    again = from_status(status_pb2.Status.FromString(to_status(error).SerializeToString()))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_every_status_carries_one_error_info_with_reason_and_domain(
    kind: type[ArbitrageError],
) -> None:
    infos = [
        detail
        for detail in to_status(made(kind)).details
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)
    ]
    info = error_details_pb2.ErrorInfo()
    assert len(infos) == 1
    assert infos[0].Unpack(info)
    assert (info.reason, info.domain) == (kind.reason, DOMAIN)
    if issubclass(kind, InvalidRequest):
        assert {"field", "value", "fix"} <= set(info.metadata)


def test_overloaded_says_when_to_come_back() -> None:
    retry = error_details_pb2.RetryInfo()
    assert to_status(Overloaded("full", retry_after_s=2.25)).details[1].Unpack(retry)
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (2, 250_000_000)


def test_a_value_that_is_no_text_can_still_be_reported() -> None:
    status = to_status(FieldInvalid("problem", "a\ud800b", "is odd", "mend it"))
    assert "\\ud800" in status.message


def test_a_status_without_details_is_taken_by_its_code() -> None:
    codes = grpc.StatusCode
    assert type(from_rpc_error(FailedCall(codes.UNAVAILABLE, "gone"))) is NotServing
    gone = from_rpc_error(FailedCall(codes.UNAVAILABLE, "gone", None), PrmUnavailable)
    assert type(gone) is PrmUnavailable
    assert str(gone) == "gone"
    assert type(from_rpc_error(FailedCall(codes.DATA_LOSS, "lost"))) is Internal


def test_details_that_do_not_belong_to_the_status_are_not_believed() -> None:
    empty = to_status(ProblemEmpty("problem", "", "is empty", "fill it")).SerializeToString()
    for metadata in (((DETAILS_KEY, b"\xff\xff"),), ((DETAILS_KEY, empty),)):
        error = from_rpc_error(FailedCall(grpc.StatusCode.UNAVAILABLE, "gone", metadata))
        assert type(error) is NotServing


def test_a_reason_of_another_domain_is_not_ours() -> None:
    status = to_status(TargetUnavailable("gone"))
    info = error_details_pb2.ErrorInfo(reason="TARGET_UNAVAILABLE", domain="elsewhere")
    status.details[0].Pack(info)
    assert type(from_status(status)) is NotServing


def test_a_message_above_the_size_limit_says_which_setting_to_raise() -> None:
    words = "SERVER: Received message larger than max (20000000 vs. 16777216)"
    error = from_rpc_error(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, words))
    assert type(error) is FieldInvalid
    assert "ARBITRAGE_MAX_MESSAGE_MIB" in str(error)


@pytest.mark.parametrize("seconds", [2**63 - 1, -(2**63)])
def test_no_time_to_come_back_is_too_long_to_send_on(seconds: int) -> None:
    status = to_status(Overloaded("full"))
    status.details[1].Pack(error_details_pb2.RetryInfo(retry_delay={"seconds": seconds}))
    error = from_status(status)
    assert isinstance(error, Overloaded)
    assert 0.0 <= error.retry_after_s <= 86_400.0
    assert to_status(error).details[1].Is(error_details_pb2.RetryInfo.DESCRIPTOR)
