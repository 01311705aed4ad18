"""Where a server of the Open Inference Protocol is. Knows nothing of the protocol's library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OipServer:
    """A model on such a server, and how long an answer may take, in seconds.

    `address` is host:port of its gRPC port; `ca` holds the PEM certificates that are believed, and
    makes the connection TLS.
    """

    address: str
    model: str
    timeout_s: float
    ca: bytes | None = None
