"""Who is calling: by certificate, by API key, or anyone.

An authenticator stands in front of every method of a service. Health and reflection are services
of their own, which it does not see: a prober has no key. Under mutual TLS they need a certificate
like everything else, since the handshake comes before any call.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from services.rpc.refusals import CallerRefused, Refusal

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what they may. None is no limit of their own."""

    tenant: str
    key_id: str = ""
    policies: frozenset[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None


ANONYMOUS = Caller("anonymous")
_current: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)


class Authenticator(Protocol):
    """Says who is calling."""

    async def authenticate(
        self, method: str, metadata: Metadata, identities: frozenset[str]
    ) -> Caller:
        """Returns the caller; `identities` are the DNS names and URIs of their certificate.

        Raises:
            KeyRefused, CallerRefused
        """
        ...


def current_caller() -> Caller:
    """Returns who makes the call that is running."""
    return _current.get()


def enter_call(caller: Caller) -> None:
    """Sets who makes the call that runs in this task, until the task ends."""
    _current.set(caller)


def check_policy(policy: str) -> None:
    """Checks that the caller's key allows a policy.

    Raises:
        CallerRefused
    """
    caller = current_caller()
    if caller.policies is not None and policy not in caller.policies:
        raise CallerRefused(
            Refusal.POLICY_NOT_ALLOWED,
            f"policy: {policy} is not allowed for this API key; ask for one of "
            f"{', '.join(sorted(caller.policies))}",
            caller.key_id,
        )


class Anyone:
    """Lets everyone in, as nobody in particular."""

    async def authenticate(
        self, method: str, metadata: Metadata, identities: frozenset[str]
    ) -> Caller:
        """Returns `ANONYMOUS`."""
        return ANONYMOUS


class AllowedCallers:
    """Lets in whose certificate bears one of some names, and then asks `inner`."""

    def __init__(self, names: frozenset[str], inner: Authenticator) -> None:
        self._names = names
        self._inner = inner

    async def authenticate(
        self, method: str, metadata: Metadata, identities: frozenset[str]
    ) -> Caller:
        """Returns who `inner` says it is.

        Raises:
            CallerRefused
        """
        if self._names.isdisjoint(identities):
            shown = ", ".join(sorted(identities)) or "no DNS name or URI"
            raise CallerRefused(
                Refusal.CALLER_NOT_ALLOWED,
                f"the caller's certificate has {shown}, which may not call {method}; add one of "
                "its names to ARBITRAGE_ALLOWED_CALLERS of this service",
            )
        return await self._inner.authenticate(method, metadata, identities)
