"""Certificates of authorities that exist for one test, as PEM files."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from arbitrage.client import ClientTls
from services.rpc.tls import TlsFiles

SERVER_NAMES = ("localhost", "127.0.0.1")


class Authority:
    """Signs certificates, and puts them and their keys into a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.path = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(self.path)

    def issue(
        self, name: str, *names: str, common_name: str | None = None, year: int | None = None
    ) -> tuple[Path, Path]:
        """Writes `name`.pem and `name`.key for a holder of `names`; `year` is one long past."""
        begin = None if year is None else datetime(year, 1, 1, tzinfo=UTC)
        leaf = self._ca.issue_cert(
            *names,
            common_name=common_name,
            not_before=begin,
            not_after=(begin or datetime.now(UTC)) + timedelta(days=1),
        )
        return self._written(
            name,
            b"".join(blob.bytes() for blob in leaf.cert_chain_pems),
            leaf.private_key_pem.bytes(),
        )

    def issue_for_uri(self, name: str, uri: str) -> tuple[Path, Path]:
        """Writes a certificate whose only name is a URI, as SPIFFE's are."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        issuer_key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        issuer = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True
            )
            .sign(issuer_key, hashes.SHA256())  # type: ignore[arg-type]  # some keys cannot sign
        )
        return self._written(
            name,
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def server(self, *, client_ca: Path | None = None) -> TlsFiles:
        """Returns the files of a server on this machine."""
        certificate, key = self.issue("server", *SERVER_NAMES)
        return TlsFiles(client_ca, certificate, key)

    async def client(self, own: tuple[Path, Path] | None = None) -> ClientTls:
        """Returns what a client needs that believes this authority."""
        certificate, key = own or (None, None)
        return await asyncio.to_thread(ClientTls, ca=self.path, certificate=certificate, key=key)

    def _written(self, name: str, certificate: bytes, key: bytes) -> tuple[Path, Path]:
        paths = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        for path, content in zip(paths, (certificate, key), strict=True):
            partial = path.with_suffix(".partial")
            partial.write_bytes(content)
            partial.replace(path)
        return paths
