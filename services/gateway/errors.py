"""What an error is over HTTP: a status, and the body that OpenAI's clients read. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import grpc

from arbitrage.core.errors import ArbitrageError, InvalidRequest, Overloaded
from arbitrage.status import code_of

# What a client that has gone would have got; nginx's number.
CLIENT_GONE: Final = 499

_STATUSES: Final[Mapping[grpc.StatusCode, int]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: 400,
        grpc.StatusCode.FAILED_PRECONDITION: 400,
        grpc.StatusCode.UNAUTHENTICATED: 401,
        grpc.StatusCode.PERMISSION_DENIED: 403,
        grpc.StatusCode.ABORTED: 409,
        grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
        grpc.StatusCode.CANCELLED: CLIENT_GONE,
        grpc.StatusCode.INTERNAL: 500,
        grpc.StatusCode.UNAVAILABLE: 503,
        grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    }
)
_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        429: "rate_limit_error",
        500: "server_error",
        503: "server_error",
        504: "server_error",
    }
)
# Those that no error of ours stands for: no such path, method or model, a body late or too large.
STATUSES: Final = (200, 404, 405, 408, 413, *sorted(set(_STATUSES.values())))


class HttpError(ArbitrageError):
    """A request that HTTP itself has a status for."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        self.status = status
        self.code = code
        self.param = param
        super().__init__(message)


def status_of(error: ArbitrageError) -> int:
    """Returns the HTTP status of an error."""
    return error.status if isinstance(error, HttpError) else _STATUSES[code_of(error)]


def headers_of(error: ArbitrageError) -> Mapping[str, str]:
    """Returns the headers that go with it. OpenAI's clients wait as long as they say."""
    if not isinstance(error, Overloaded):
        return {}
    return {
        "retry-after": str(math.ceil(error.retry_after_s)),
        "retry-after-ms": str(math.ceil(1e3 * error.retry_after_s)),
    }


def body_of(error: ArbitrageError) -> dict[str, Any]:
    """Returns the body: message, type, the field at fault, and the reason as its code."""
    if isinstance(error, HttpError):
        param, code = error.param, error.code
    else:
        param = error.field if isinstance(error, InvalidRequest) else None
        code = error.reason.lower()
    kind = _TYPES.get(status_of(error), "invalid_request_error")
    # What was asked for may hold half a character, which JSON in UTF-8 cannot.
    message = str(error).encode("utf-8", "backslashreplace").decode("utf-8")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
