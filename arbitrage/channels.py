"""Channels to a server: plaintext or TLS, sync or async, and the metadata that carries a key."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Self

import grpc
import grpc.aio

from arbitrage.core.errors import FieldInvalid
from arbitrage.pem import Pem, PemError, read_pem

ChannelOptions = Sequence[tuple[str, int | str]]
KEEPALIVE_S = 10.0
Metadata = tuple[tuple[str, str], ...]


def lasting(keepalive_s: float = KEEPALIVE_S) -> tuple[tuple[str, int], ...]:
    """Returns the options of a channel that notices a server that is lost, and its return.

    A server that is silent for `keepalive_s` seconds in the middle of a call is asked whether it is
    there, and lost where it does not say so in half of that.
    """
    return (
        # By default gRPC waits up to two minutes before it tries a lost server again.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
        # Its name misleads: this is the time that one try to connect gets, TLS included.
        ("grpc.min_reconnect_backoff_ms", 2_000),
        # A host that vanishes says nothing; without these a call there waits for its own timeout.
        ("grpc.keepalive_time_ms", round(1e3 * keepalive_s)),
        ("grpc.keepalive_timeout_ms", round(5e2 * keepalive_s)),
        # gRPC 1.80 goes by this one, a minute by default, and by the former only in the kernel.
        ("grpc.http2.ping_timeout_ms", round(5e2 * keepalive_s)),
        ("grpc.http2.max_pings_without_data", 0),
    )


class ClientTls:
    """Asks for TLS. The files are PEM, and are read when this is made, not when it is used.

    `ca` holds the certificates that are believed, by default those that gRPC brings along.
    `certificate` and `key` are the caller's own, for a server that wants to see one.

    Raises:
        FieldInvalid: a file cannot be used.
    """

    def __init__(
        self,
        *,
        ca: str | PathLike[str] | None = None,
        certificate: str | PathLike[str] | None = None,
        key: str | PathLike[str] | None = None,
    ) -> None:
        if (certificate is None) != (key is None):
            given, absent = ("certificate", "key") if key is None else ("key", "certificate")
            raise FieldInvalid(
                f"tls.{absent}", None, f"is needed beside tls.{given}", "give both or neither"
            )
        paths = (None if path is None else Path(path) for path in (ca, certificate, key))
        try:
            self.credentials = channel_credentials(read_pem(*paths))
        except PemError as error:
            path = str(error.path)
            raise FieldInvalid(f"tls.{error.part}", path, error.problem, error.fix) from None

    @classmethod
    def of(cls, pem: Pem) -> Self:
        """Asks for TLS with what files held."""
        made = cls.__new__(cls)
        made.credentials = channel_credentials(pem)
        return made


def sync_channel(address: str, tls: ClientTls | None, options: ChannelOptions) -> grpc.Channel:
    """Returns a channel, plaintext without `tls`. It connects when it is first used."""
    if tls is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, tls.credentials, options)


def aio_channel(address: str, tls: ClientTls | None, options: ChannelOptions) -> grpc.aio.Channel:
    """Returns a channel for asyncio; otherwise as `sync_channel`."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, tls.credentials, options)


def channel_credentials(pem: Pem) -> grpc.ChannelCredentials:
    """Returns gRPC's form of a client's files."""
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)


def call_metadata(
    api_key: str | None, address: str, *, is_encrypted: bool, allow_plaintext: bool = False
) -> Metadata:
    """Returns the metadata of every call to `address`; none without a key.

    Raises:
        FieldInvalid: the key is no text for a header, or anyone on the way could read it.
    """
    if api_key is None:
        return ()
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        # The value stays out of the message: most of it may be the key.
        raise FieldInvalid(
            "api_key",
            "(not shown)",
            "is empty or has a character that no key has",
            "give the key as it was issued, without spaces or line ends",
        )
    if not (is_encrypted or allow_plaintext or is_loopback(address)):
        raise FieldInvalid(
            "address",
            address,
            "would get the API key in plaintext",
            "use TLS (tls=ClientTls(…), or --tls), or allow_plaintext_key=True where the network "
            "is trusted",
        )
    return (("authorization", f"Bearer {api_key}"),)


def is_loopback(address: str) -> bool:
    """Returns whether an address, with or without a port, is this machine's own.

    >>> [is_loopback(text) for text in ("localhost:1", "127.0.0.1", "[::1]:1", "10.0.0.1:1")]
    [True, True, True, False]
    """
    if address.startswith("unix:"):
        return True
    host = address.removeprefix("dns:///")
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
