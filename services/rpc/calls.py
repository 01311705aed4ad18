"""One question to a model service: its deadline, its repeats, and what its failure means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
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
from arbitrage.status import from_rpc_error, is_from_server
from services.rpc.attempts import Attempt
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


# Asks a replica that has so many seconds; returns what gRPC calls a call.
Ask = Callable[[Replica, float], Any]


class ModelCall:
    """One question to a role: who is asked, how long it may take, what it ends with.

    `key` is what keeps a request to one replica. `limit_s` bounds the call as it does any;
    `own_limit_s` is what its request's time allows. Where a replica fails, another is asked, within
    the pool's budget. Where all are overloaded, they are asked again when they say, a few times and
    within that time. `kind` names questions whose answers take about as long as each other's: one
    that takes longer is asked of a second replica too, where the pool hedges. None is never hedged.
    """

    def __init__(
        self,
        pool: Pool,
        key: bytes,
        unavailable: type[ModelUnavailable],
        limit_s: float,
        own_limit_s: float | None = None,
        kind: str | None = None,
    ) -> None:
        self._pool = pool
        self._key = key
        self._unavailable = unavailable
        self.role = role_of(unavailable)
        self._is_bound_by_request = own_limit_s is not None and own_limit_s < limit_s
        bound_s = limit_s if own_limit_s is None else min(limit_s, own_limit_s)
        self._deadline_s = time.monotonic() + bound_s
        self._kind = kind
        self._began_s: float | None = None
        self._repeats_left = _OVERLOADED_REPEATS
        self._tried: list[Replica] = []
        pool.began()

    @property
    def waited_s(self) -> float:
        """The seconds since it was first asked; 0 before."""
        return 0.0 if self._began_s is None else time.monotonic() - self._began_s

    @property
    def has_another(self) -> bool:
        """Whether a replica serves that was not asked."""
        return self._pool.choose(self._key, self._tried) is not None

    @asynccontextmanager
    async def attempt(self, ask: Ask) -> AsyncIterator[Attempt]:
        """Asks a replica, and a second one where it is slow; holds the one that answers.

        Where none does, that is the one that failed last.

        Raises:
            DeadlineExceeded: no time is left; with a timeout of 0 s gRPC would still try its luck.
            ModelUnavailable: there is nobody to ask.
        """
        if self._left_s <= 0.0:
            raise DeadlineExceeded(f"the time limit was over before the {self.role} was asked")
        chosen = self._pool.choose(self._key, self._tried)
        if chosen is None:
            raise self._unavailable(f"no replica of the {self.role} at {self._pool.address} serves")
        attempts = [self._begin(chosen, ask)]
        try:
            yield await self._first_to_answer(attempts, ask)
        finally:
            for attempt in attempts:
                attempt.end()

    async def failed(
        self, replica: Replica, error: grpc.aio.AioRpcError, *, may_repeat: bool = True
    ) -> None:
        """Returns when the question may be asked again.

        Raises:
            ArbitrageError: it may not; what the failure means for the request.
        """
        known = self._blame(replica, error)
        if isinstance(known, Overloaded):
            if may_repeat and self.has_another:
                return
            wait_s = self._repeat_after_s(known) if may_repeat else None
            if wait_s is not None:
                self._repeats_left -= 1
                self._tried.clear()
                await asyncio.sleep(wait_s)
                return
        elif (
            may_repeat
            and self._is_of_replica(known)
            and self.has_another
            and self._left_s > 0.0
            # One that refuses because it stops has done no work: asking another costs nothing.
            and (isinstance(known, NotServing) or self._pool.may_retry())
        ):
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

    @property
    def _left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    def _begin(self, replica: Replica, ask: Ask) -> Attempt:
        attempt = Attempt(replica, ask(replica, self._left_s))
        self._tried.append(replica)
        if self._began_s is None:
            self._began_s = attempt.began_s
        return attempt

    async def _first_to_answer(self, attempts: list[Attempt], ask: Ask) -> Attempt:
        (first,) = attempts
        times, kind = self._pool.answer_times, self._kind
        late_s = None if kind is None else times.late_s(kind)
        if late_s is None:
            await first.wait()
            winner = first
        else:
            winner = await self._raced(attempts, ask, late_s)
        if kind is not None and winner.has_answered:
            # Since the first was asked: a late answer is one, whoever gave it.
            times.add(kind, time.monotonic() - first.began_s)
        return winner

    async def _raced(self, attempts: list[Attempt], ask: Ask, late_s: float) -> Attempt:
        """Returns the first of one attempt, or of two from `late_s` on, to answer."""
        (first,) = attempts
        async with asyncio.TaskGroup() as group:
            waits = {group.create_task(first.wait()): first}
            await asyncio.wait(waits, timeout=late_s)
            if first.is_waited_for and (spare := self._spare()) is not None:
                second = self._begin(spare, ask)
                attempts.append(second)
                waits[group.create_task(second.wait())] = second
            while True:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                ended = waits.pop(done.pop())
                if ended.failure is None or not waits:
                    break
                self._blame(ended.replica, ended.failure)
            # A loser's server stops its work; that it was slower is no failure.
            for loser in waits.values():
                loser.end()
        if ended is not first and ended.has_answered:
            self._pool.metrics.count_hedge_won(self.role)
        return ended

    def _spare(self) -> Replica | None:
        if self._left_s <= 0.0:
            return None
        spare = self._pool.choose(self._key, self._tried, is_spare=True)
        return spare if spare is not None and self._pool.may_hedge() else None

    def _blame(self, replica: Replica, error: grpc.aio.AioRpcError) -> ArbitrageError:
        """Returns what a failure is; a replica that is gone, stops or hangs is ejected."""
        known = from_rpc_error(error, self._unavailable)
        # One that says itself that its time is over does not hang.
        if self._is_of_replica(known) and not (
            isinstance(known, DeadlineExceeded) and is_from_server(error)
        ):
            self._pool.eject(replica)
        return known

    def _is_of_replica(self, known: ArbitrageError) -> bool:
        # A server that stops cancels its calls.
        return isinstance(known, Unavailable | Cancelled) or (
            isinstance(known, DeadlineExceeded) and not self._is_bound_by_request
        )

    def _repeat_after_s(self, overloaded: Overloaded) -> float | None:
        if not self._repeats_left:
            return None
        wait_s = max(_LEAST_RETRY_S, overloaded.retry_after_s)
        return wait_s if wait_s < self._left_s else None

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

        def ask(replica: Replica, timeout_s: float) -> Any:
            rpc = getattr(replica.stub(stub), method)
            return rpc(request, timeout=timeout_s, metadata=asked_model.metadata)

        while True:
            async with call.attempt(ask) as attempt:
                try:
                    answer = await attempt.read()
                except grpc.aio.AioRpcError as error:
                    failure = error
                else:
                    attempt.replica.succeeded()
                    asked_model.answered(answer)
                    return answer
            await call.failed(attempt.replica, failure)


def key_of(problem: str) -> bytes:
    """Returns what keeps all steps of a problem on one replica."""
    return blake2b(problem.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def role_of(unavailable: type[ModelUnavailable]) -> str:
    """Returns the role that is missing where this is raised."""
    return unavailable.__name__.removesuffix("Unavailable").lower()


def left_s(deadline_s: float | None) -> float | None:
    """Returns the seconds until a moment of the monotonic clock, never below 0."""
    return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
