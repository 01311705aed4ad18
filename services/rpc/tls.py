"""TLS of servers, and of channels to model services, from PEM files that may be replaced.

A server looks at its files at each handshake, so that a renewed certificate is shown to the next
caller. Connections that stand keep the one they began with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from arbitrage.channels import channel_credentials
from arbitrage.pem import Part, Pem, PemError, read_pem
from services.rpc.pool import open_channel
from services.rpc.settings import ServerSettings, variable_of
from services.rpc.watched import WatchedFiles


class TlsError(Exception):
    """TLS cannot be had as told. The message names the variable, the file and the fix."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where one end's files lie, and the settings that say so: `prefix` and the part's name."""

    ca: Path | None
    certificate: Path | None
    key: Path | None
    prefix: str = "tls"

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files there are."""
        return tuple(path for path in (self.ca, self.certificate, self.key) if path is not None)

    def read(self) -> Pem:
        """Returns what they hold.

        Raises:
            TlsError
        """
        try:
            return read_pem(self.ca, self.certificate, self.key)
        except PemError as error:
            raise TlsError(f"{self._variable(error.part)}: {error}") from None

    def watched(self, on_failure: Callable[[], None]) -> WatchedFiles[Pem]:
        """Reads them, and again when they change.

        Raises:
            TlsError
        """
        return WatchedFiles(self.paths, self.read, on_failure)

    def _variable(self, part: Part) -> str:
        is_clients = part == "ca" and self.prefix == "tls"
        return variable_of(f"{self.prefix}_client_ca" if is_clients else f"{self.prefix}_{part}")


def server_files(settings: ServerSettings) -> TlsFiles | None:
    """Returns the files that a server was told of; None is plaintext."""
    if settings.tls_certificate is None:
        return None
    return TlsFiles(settings.tls_client_ca, settings.tls_certificate, settings.tls_key)


def client_files(settings: ServerSettings, prefix: str) -> TlsFiles | None:
    """Returns the files that others are reached with, by the settings of that prefix.

    None is plaintext.
    """
    ca, certificate, key = (
        getattr(settings, f"{prefix}_{part}") for part in ("ca", "certificate", "key")
    )
    return None if ca is None else TlsFiles(ca, certificate, key, prefix)


def server_credentials(files: WatchedFiles[Pem]) -> grpc.ServerCredentials:
    """Returns credentials that follow the files.

    Where they name a CA, a caller must show a certificate of it. gRPC asks for newer files at each
    handshake, on threads of its own.
    """

    def newer() -> grpc.ServerCertificateConfiguration | None:
        return _configuration(files.value) if files.look() else None

    is_mutual = files.value.ca is not None
    return grpc.dynamic_ssl_server_credentials(
        _configuration(files.value),
        newer,  # type: ignore[arg-type]  # grpc-stubs forget that None is "nothing new"
        require_client_authentication=is_mutual,
    )


class ChannelOpener:
    """Opens channels to model services, with TLS where `files` are given.

    The files were read before, and are read again by `changed`: opening touches no disk.
    """

    def __init__(self, max_message_mib: int, files: WatchedFiles[Pem] | None = None) -> None:
        self._max_message_mib = max_message_mib
        self._files = files
        self._opened_with = None if files is None else files.value

    def __call__(self, address: str, name: str = "") -> grpc.aio.Channel:
        """Returns a channel. The server's certificate must name `name`.

        By default that is the host in `address`; an address that was looked up before needs it.
        """
        if self._files is None:
            return open_channel(address, name, self._max_message_mib)
        self._opened_with = self._files.value
        credentials = channel_credentials(self._opened_with)
        return open_channel(address, name, self._max_message_mib, credentials)

    def changed(self) -> bool:
        """Looks at the files; returns whether a channel opened now would use others.

        Touches the disk, so a coroutine calls it in a thread.
        """
        if self._files is None:
            return False
        self._files.look()
        return self._files.value is not self._opened_with


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    assert pem.key is not None, "a server has both"
    assert pem.certificate is not None, "a server has both"
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.ca)
