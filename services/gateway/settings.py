"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from arbitrage.calls import Addresses
from arbitrage.channels import is_loopback
from arbitrage.core.errors import FieldInvalid
from arbitrage.core.shown import shown
from services.rpc.settings import Port, ServerSettings, check_needs, check_pair, variable_of
from services.rpc.tls import TlsFiles, client_files


def _checked_address(address: str) -> str:
    try:
        Addresses(address)
    except FieldInvalid:
        raise PydanticCustomError(
            "address",
            "host:port with a port from 1 to 65535, several of them, or dns:///host:port, "
            "got {address}",
            {"address": shown(address)},
        ) from None
    return address


class GatewaySettings(ServerSettings):
    """What a gateway can be told."""

    port: Port = Field(8080, description="Port of the HTTP server; 0 takes a free one.")
    orchestrator_address: Annotated[str, AfterValidator(_checked_address)] = Field(
        description="Where the orchestrators are: host:port, several of them with commas between, "
        "or dns:///host:port. All that a name stands for are asked by turns; where one of several "
        "fails, the next is asked.",
    )
    orchestrator_tls_ca: Path | None = Field(
        None,
        description="PEM file with the CA of the orchestrators' certificates; without it, "
        "plaintext.",
    )
    orchestrator_tls_certificate: Path | None = Field(
        None, description="PEM file with the certificate that orchestrators are shown."
    )
    orchestrator_tls_key: Path | None = Field(None, description="PEM file with its private key.")
    allow_plaintext_keys: bool = Field(
        default=False,
        description="Passes callers' API keys on to another machine without TLS too, where the "
        "network is trusted.",
    )

    @property
    def orchestrator_tls(self) -> TlsFiles | None:
        """The files that orchestrators are reached with; None is plaintext."""
        return client_files(self, "orchestrator_tls")

    @property
    def passes_keys_on(self) -> bool:
        """Whether nobody on the way can read a caller's key, or that is put up with."""
        if self.orchestrator_tls_ca is not None or self.allow_plaintext_keys:
            return True
        return all(map(is_loopback, Addresses(self.orchestrator_address).all))

    @model_validator(mode="after")
    def _orchestrator_tls_is_whole(self) -> Self:
        check_pair(self, "orchestrator_tls")
        check_needs(self, "orchestrator_tls_certificate", "orchestrator_tls_ca")
        return self

    @model_validator(mode="after")
    def _callers_have_keys(self) -> Self:
        if self.allowed_callers:
            raise ValueError(
                f"{variable_of('allowed_callers')}: the gateway does not look at names in "
                "certificates; leave it out, and give callers API keys"
            )
        return self
