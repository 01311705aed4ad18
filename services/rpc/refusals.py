"""Callers that were turned away: why, how often, and one line each in the log.

A key is never written anywhere, nor its digest.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter as Counts
from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter

from arbitrage.core.errors import PermissionDenied, Unauthenticated

_log = logging.getLogger(__name__)
# Whoever tries keys, or scans ports, must not fill the disk.
_LINE_INTERVAL_S = 1.0


class Refusal(StrEnum):
    """Why a caller was turned away."""

    MISSING_KEY = "missing_key"
    UNKNOWN_KEY = "unknown_key"
    REVOKED_KEY = "revoked_key"
    EXPIRED_KEY = "expired_key"
    POLICY_NOT_ALLOWED = "policy_not_allowed"
    CALLER_NOT_ALLOWED = "caller_not_allowed"
    TLS_HANDSHAKE = "tls_handshake"


class KeyRefused(Unauthenticated):
    """The call has no key that opens this server. `key_id` is empty where none was recognised."""

    def __init__(self, refusal: Refusal, message: str, key_id: str = "") -> None:
        self.refusal = refusal
        self.key_id = key_id
        super().__init__(message)


class CallerRefused(PermissionDenied):
    """The caller is known, by key or certificate, and may not do that."""

    def __init__(self, refusal: Refusal, message: str, key_id: str = "") -> None:
        self.refusal = refusal
        self.key_id = key_id
        super().__init__(message)


class Refusals:
    """Counts refusals, and logs one line a second of each kind at most.

    Every cause of failed handshakes is a kind, so that one caller's does not hide another's.
    """

    def __init__(
        self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._counter = Counter(
            "arbitrage_refused_calls",
            "Callers turned away, by reason.",
            ("reason",),
            registry=registry,
        )
        for refusal in Refusal:
            self._counter.labels(refusal.value)
        # By refusal and cause. The TLS library has a fixed set of causes, whoever calls.
        self._quiet_until_s: dict[tuple[Refusal, str], float] = {}
        self._unsaid_counts: Counts[tuple[Refusal, str]] = Counts()

    def count_error(self, error: Exception, peer: str) -> None:
        """Counts an error that a call ended with, where it is a refusal."""
        if isinstance(error, KeyRefused | CallerRefused):
            who = f"{peer}, key {error.key_id}" if error.key_id else peer
            self._count(error.refusal, who)

    def count_handshake(self, cause: str) -> None:
        """Counts a TLS handshake that failed. gRPC does not say whose."""
        self._count(Refusal.TLS_HANDSHAKE, cause, cause)

    def _count(self, refusal: Refusal, who: str, cause: str = "") -> None:
        self._counter.labels(refusal.value).inc()
        kind, now_s = (refusal, cause), self._clock()
        if now_s < self._quiet_until_s.get(kind, -math.inf):
            self._unsaid_counts[kind] += 1
            return
        self._quiet_until_s[kind] = now_s + _LINE_INTERVAL_S
        unsaid = self._unsaid_counts.pop(kind, 0)
        _log.warning("refused (%s): %s; %d more since the last line", refusal.value, who, unsaid)
