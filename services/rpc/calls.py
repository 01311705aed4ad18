"""One question to a model service: its deadline, its repeats, and what its failure means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from arbitrage.core.errors import (
    ArbitrageError,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    ModelUnavailable,
    NotServing,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from arbitrage.status import from_rpc_error
from services.rpc.pool import Pool, Replica
from services.rpc.tracing import asking

_OVERLOADED_REPEATS = 3
# A model that is overloaded and says 0 s is not asked again in a busy loop.
_LEAST_RETRY_S = 0.01
MessageT = TypeVar("MessageT", bound=Message)
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class CallLimits:
    """How long a model call may take, in seconds.

    `timeout_s` bounds any call. A call with a time limit of its own gets `grace_s` more than that,
    for the way there and back: the model ends the step in time, the transport only backs it up.
    A question about the model itself gets `grace_s`.
    """

    timeout_s: float = 120.0
    grace_s: float = 2.0


DEFAULT_LIMITS = CallLimits()


class ModelCall:
    """One question to a role: who is asked, how long it may take, what it ends with.

    `key` is what keeps a request to one replica. `limit_s` bounds the call as it does any;
    `own_limit_s` is what its request's time allows. Where a replica fails, another is asked, within
    the pool's budget. Where all are overloaded, they are asked again when they say, a few times and
    within that time.
    """

    def __init__(
        self,
        pool: Pool,
        key: bytes,
        unavailable: type[ModelUnavailable],
        limit_s: float,
        own_limit_s: float | None = None,
    ) -> None:
        self._pool = pool
        self._key = key
        self._unavailable = unavailable
        self.role = role_of(unavailable)
        self._is_bound_by_request = own_limit_s is not None and own_limit_s < limit_s
        bound_s = limit_s if own_limit_s is None else min(limit_s, own_limit_s)
        self._deadline_s = time.monotonic() + bound_s
        self._repeats_left = _OVERLOADED_REPEATS
        self._tried: list[Replica] = []
        pool.began()

    def timeout_s(self) -> float:
        """Returns the seconds the model has for its answer.

        Raises:
            DeadlineExceeded: there are none; with a timeout of 0 s gRPC would still try its luck.
        """
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0.0:
            raise DeadlineExceeded(f"the time limit was over before the {self.role} was asked")
        return left_s

    @contextmanager
    def replica(self) -> Iterator[Replica]:
        """Holds the replica to ask now.

        Raises:
            ModelUnavailable: there is none.
        """
        chosen = self._pool.choose(self._key, self._tried)
        if chosen is None:
            raise self._unavailable(f"no replica of the {self.role} at {self._pool.address} serves")
        self._tried.append(chosen)
        chosen.inflight_count += 1
        try:
            yield chosen
        finally:
            chosen.inflight_count -= 1

    async def failed(self, error: grpc.aio.AioRpcError, *, may_repeat: bool = True) -> None:
        """Returns when the question may be asked again.

        Raises:
            ArbitrageError: it may not; what the failure means for the request.
        """
        known = from_rpc_error(error, self._unavailable)
        if isinstance(known, Overloaded):
            if may_repeat and self._pool.choose(self._key, self._tried) is not None:
                return
            wait_s = self._repeat_after_s(known) if may_repeat else None
            if wait_s is not None:
                self._repeats_left -= 1
                self._tried.clear()
                await asyncio.sleep(wait_s)
                return
        elif isinstance(known, Unavailable | Cancelled) or (
            isinstance(known, DeadlineExceeded) and not self._is_bound_by_request
        ):
            # It is gone, stops, or hangs: a server that stops cancels its calls.
            self._pool.eject(self._tried[-1])
            has_another = self._pool.choose(self._key, self._tried) is not None
            # One that refuses because it stops has done no work: asking another costs nothing.
            is_free = isinstance(known, NotServing)
            if may_repeat and has_another and (is_free or self._pool.may_retry()):
                return
        raise self._typed(known) from error

    def answer(self, convert: Callable[[MessageT], ValueT], message: MessageT) -> ValueT:
        """Returns the core value of the model's answer.

        Raises:
            Internal: it cannot be one; names the role, for the caller is not to blame.
        """
        try:
            return convert(message)
        except (InvalidRequest, Internal) as error:
            raise Internal(f"{self.role}: its answer cannot be used: {error}") from error

    def _repeat_after_s(self, overloaded: Overloaded) -> float | None:
        if not self._repeats_left:
            return None
        wait_s = max(_LEAST_RETRY_S, overloaded.retry_after_s)
        return wait_s if wait_s < self._deadline_s - time.monotonic() else None

    def _typed(self, known: ArbitrageError) -> ArbitrageError:
        if isinstance(known, DeadlineExceeded) and self._is_bound_by_request:
            # The request's own time was over before the time that any call may take.
            return known
        # A server that stops cancels its calls, one that hangs runs into the deadline of any call,
        # and one that stays overloaded has no place: for the request, the model is not there.
        if isinstance(known, Unavailable | DeadlineExceeded | Cancelled | Overloaded):
            return known if isinstance(known, self._unavailable) else self._unavailable(str(known))
        if isinstance(known, Internal | Unauthenticated | PermissionDenied):
            # It is this program that the model turned away, not the one who asked it.
            return Internal(f"{self.role}: {known}")
        return known


async def asked(
    call: ModelCall,
    stub: Callable[[grpc.aio.Channel], Any],
    method: str,
    request: Message,
) -> Any:
    """Returns a model's one answer; raises as `ModelCall.failed` does."""
    with asking(call.role, method) as asked_model:
        while True:
            with call.replica() as replica:
                ask = getattr(replica.stub(stub), method)
                try:
                    answer = await ask(
                        request, timeout=call.timeout_s(), metadata=asked_model.metadata
                    )
                except grpc.aio.AioRpcError as error:
                    failure = error
                else:
                    replica.succeeded()
                    asked_model.answered(answer)
                    return answer
            await call.failed(failure)


def key_of(problem: str) -> bytes:
    """Returns what keeps all steps of a problem on one replica."""
    return blake2b(problem.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def role_of(unavailable: type[ModelUnavailable]) -> str:
    """Returns the role that is missing where this is raised."""
    return unavailable.__name__.removesuffix("Unavailable").lower()


def left_s(deadline_s: float | None) -> float | None:
    """Returns the seconds until a moment of the monotonic clock, never below 0."""
    return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
