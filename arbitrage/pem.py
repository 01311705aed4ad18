"""Reads the PEM files of one end of a TLS connection, and says what is wrong with them.

gRPC takes any bytes and fails at the first handshake, without a word about the file. So what is
read here is checked first, by Python's own `ssl`.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["ca", "certificate", "key"]


class PemError(Exception):
    """A file cannot be used; says which of the three, what is wrong, and how to mend it."""

    def __init__(self, part: Part, path: Path, problem: str, fix: str) -> None:
        self.part = part
        self.path = path
        self.problem = problem
        self.fix = fix
        super().__init__(f"{path}: {problem}; {fix}")


@dataclass(frozen=True, slots=True)
class Pem:
    """What one end shows, and whom it believes. A key comes with its certificate, or neither."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    def __repr__(self) -> str:
        """Shows nothing: a key must not reach a log by way of a trace."""
        return "Pem(…)"


def read_pem(ca: Path | None, certificate: Path | None, key: Path | None) -> Pem:
    """Returns what the files hold.

    Raises:
        PemError: a file is missing or no PEM, or the key is not the certificate's.
    """
    if certificate is None or key is None:
        assert certificate is key, "a certificate comes with its key"
        return Pem(ca=None if ca is None else _certificates("ca", ca))
    pem = Pem(
        ca=None if ca is None else _certificates("ca", ca),
        certificate=_certificates("certificate", certificate),
        key=_bytes_of("key", key),
    )
    _check_pair(certificate, key)
    # `ssl` takes paths only, so what it has checked may be newer than what was read.
    if pem.certificate != _bytes_of("certificate", certificate) or pem.key != _bytes_of("key", key):
        raise PemError("certificate", certificate, "changes while it is read", "try again")
    return pem


def _bytes_of(part: Part, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PemError(
            part, path, f"cannot be read ({error.strerror})", "name a PEM file that can be"
        ) from None


def _certificates(part: Part, path: Path) -> bytes:
    content = _bytes_of(part, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode())
    except (ssl.SSLError, ValueError):
        raise PemError(
            part, path, "holds no certificate", "give a file with a whole PEM CERTIFICATE block"
        ) from None
    return content


def _check_pair(certificate: Path, key: Path) -> None:
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            problem, fix = (
                f"is not the key of {certificate}",
                "give the two that were made together",
            )
        else:
            problem, fix = "holds no key", "give an unencrypted PEM private key, whole"
        raise PemError("key", key, problem, fix) from None
