"""Turns errors into `google.rpc.Status` and back: the one table of reasons and codes.

Servers send what `to_status` makes; clients raise again what `from_rpc_error` finds.
"""

# Everything that turns an error into a status, or a status into an error, lives in this file.

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import (  # type: ignore[import-untyped]  # googleapis ship no types
    error_details_pb2,
    status_pb2,
)

from arbitrage.core.errors import (
    ArbitrageError,
    Cancelled,
    DeadlineExceeded,
    FieldInvalid,
    Internal,
    InvalidRequest,
    NotServing,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    leaves,
)

DOMAIN: Final = "arbitrage.v1"
DETAILS_KEY: Final = "grpc-status-details-bin"

CODES: Final[Mapping[str, grpc.StatusCode]] = MappingProxyType(
    {
        "MALFORMED_MESSAGE": grpc.StatusCode.INVALID_ARGUMENT,
        "PROBLEM_EMPTY": grpc.StatusCode.INVALID_ARGUMENT,
        "PROBLEM_TOO_LARGE": grpc.StatusCode.INVALID_ARGUMENT,
        "POLICY_UNKNOWN": grpc.StatusCode.INVALID_ARGUMENT,
        "THRESHOLD_OUT_OF_RANGE": grpc.StatusCode.INVALID_ARGUMENT,
        "BUDGET_OUT_OF_RANGE": grpc.StatusCode.INVALID_ARGUMENT,
        "SAMPLING_OUT_OF_RANGE": grpc.StatusCode.INVALID_ARGUMENT,
        "FIELD_INVALID": grpc.StatusCode.INVALID_ARGUMENT,
        "CONTEXT_TOO_LONG": grpc.StatusCode.INVALID_ARGUMENT,
        "SESSION_STORE_UNAVAILABLE": grpc.StatusCode.FAILED_PRECONDITION,
        "SESSION_NOT_FOUND": grpc.StatusCode.FAILED_PRECONDITION,
        "CALIBRATION_UNAVAILABLE": grpc.StatusCode.FAILED_PRECONDITION,
        "UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
        "PERMISSION_DENIED": grpc.StatusCode.PERMISSION_DENIED,
        "OVERLOADED": grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED": grpc.StatusCode.RESOURCE_EXHAUSTED,
        "DRAFT_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
        "TARGET_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
        "PRM_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
        "ROUTER_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
        "SESSION_STORE_AWAY": grpc.StatusCode.UNAVAILABLE,
        "SESSION_TAKEN": grpc.StatusCode.ABORTED,
        "NOT_SERVING": grpc.StatusCode.UNAVAILABLE,
        "DEADLINE_EXCEEDED": grpc.StatusCode.DEADLINE_EXCEEDED,
        "CANCELLED": grpc.StatusCode.CANCELLED,
        "INTERNAL": grpc.StatusCode.INTERNAL,
    }
)

_Detail = TypeVar("_Detail", error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo)
_CLASSES: Final = {error.reason: error for error in leaves()}
# grpc's own words for a message above the size limit of either side; it sends no reason for it.
_TOO_LARGE: Final = "larger than max"
# What a server says beyond that is no time to wait for; its message could not even be sent on.
_LONGEST_RETRY_S: Final = 86_400.0


def code_of(error: ArbitrageError) -> grpc.StatusCode:
    """Returns the gRPC code that goes with the error's reason."""
    return CODES.get(error.reason, grpc.StatusCode.INTERNAL)


def to_status(error: ArbitrageError) -> status_pb2.Status:
    """Returns the status a caller gets: code, message, `ErrorInfo`, and `RetryInfo` if overloaded.

    An error of a class without a reason of its own counts as `Internal`.
    """
    known = error.reason in CODES
    info = error_details_pb2.ErrorInfo(
        reason=error.reason if known else Internal.reason, domain=DOMAIN
    )
    if isinstance(error, InvalidRequest):
        info.metadata["field"] = _encodable(error.field)
        info.metadata["value"] = _encodable(error.value)
        info.metadata["problem"] = _encodable(error.problem)
        info.metadata["fix"] = _encodable(error.fix)
    status = status_pb2.Status(code=code_of(error).value[0], message=_encodable(str(error)))
    status.details.append(_packed(info))
    if isinstance(error, Overloaded):
        nanos = round(error.retry_after_s * 1e9)
        delay = duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


def from_status(
    status: status_pb2.Status, unavailable: type[Unavailable] = NotServing
) -> ArbitrageError:
    """Returns the error a status stands for, of the class that `to_status` was given.

    A status that says no reason of this API is taken by its code; `unavailable` is the class for
    UNAVAILABLE, so that whoever called a model says which one was not there.
    """
    info = _detail(status, error_details_pb2.ErrorInfo)
    if info is None or info.domain != DOMAIN or info.reason not in _CLASSES:
        return _from_code(status.code, status.message, unavailable)
    kind = _CLASSES[info.reason]
    if issubclass(kind, InvalidRequest):
        return _invalid(kind, status.message, info.metadata)
    if issubclass(kind, Overloaded):
        retry = _detail(status, error_details_pb2.RetryInfo)
        if retry is None:
            return kind(status.message)
        delay = retry.retry_delay
        delay_s = delay.seconds + delay.nanos / 1e9
        return kind(status.message, retry_after_s=min(_LONGEST_RETRY_S, max(0.0, delay_s)))
    return kind(status.message)


def from_rpc_error(
    error: grpc.RpcError, unavailable: type[Unavailable] = NotServing
) -> ArbitrageError:
    """Returns the error behind a failed call, sync or async; see `from_status`."""
    status = _sent_status(error)
    if status is not None:
        return from_status(status, unavailable)
    return _from_code(error.code().value[0], error.details() or "", unavailable)


def is_from_server(error: grpc.RpcError) -> bool:
    """Whether a server ended the call, rather than gRPC on this side, in want of an answer."""
    return _sent_status(error) is not None


def _sent_status(error: grpc.RpcError) -> status_pb2.Status | None:
    # grpc-stubs call the metadata of a failed call one pair; it is a sequence of them, or None.
    metadata: Any = error.trailing_metadata()
    for key, value in metadata or ():
        if key == DETAILS_KEY:
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                return None
            if status.code == error.code().value[0]:
                return status
    return None


def _from_code(code: int, message: str, unavailable: type[Unavailable]) -> ArbitrageError:
    if _TOO_LARGE in message:
        fix = "send less, or raise ARBITRAGE_MAX_MESSAGE_MIB"
        return FieldInvalid("message", message, "is too large", fix)
    if code == grpc.StatusCode.UNAVAILABLE.value[0]:
        return unavailable(message)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]:
        return DeadlineExceeded(message)
    if code == grpc.StatusCode.CANCELLED.value[0]:
        return Cancelled(message)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]:
        return Overloaded(message)
    if code == grpc.StatusCode.UNAUTHENTICATED.value[0]:
        return Unauthenticated(message)
    if code == grpc.StatusCode.PERMISSION_DENIED.value[0]:
        return PermissionDenied(message)
    if code == grpc.StatusCode.UNIMPLEMENTED.value[0]:
        return Internal(f"another service answers at this address: {message}")
    return Internal(message)


def _invalid(
    kind: type[InvalidRequest], message: str, metadata: Mapping[str, str]
) -> InvalidRequest:
    error = kind(
        metadata.get("field", ""), "", metadata.get("problem", message), metadata.get("fix", "")
    )
    # The server has shortened the value already, and its sentence is the one to show.
    error.value = metadata.get("value", "")
    error.args = (message,)
    return error


def _packed(detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _encodable(text: str) -> str:
    # A lone surrogate cannot travel in a protobuf string; an error about text must not fail on it.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _detail(status: status_pb2.Status, kind: type[_Detail]) -> _Detail | None:
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            found = kind()
            try:
                packed.Unpack(found)
            except DecodeError:
                return None
            return found
    return None
