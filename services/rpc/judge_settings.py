"""What a PRM and a router can be told alike: KServe's protocols, and an engine elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from services.rpc.model_program import ModelSettings
from services.rpc.settings import Port, PositiveCount, Seconds, variable_of

_PREDICTOR_FIELDS = ("kserve_http_port", "kserve_grpc_port")
_REMOTE_FIELDS = ("engine_url", "engine_ca", "engine_timeout_s")


class JudgeSettings(ModelSettings):
    """What a program that judges steps can be told."""

    # Each program says which there are.
    engine: str = "transformers"
    engine_url: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Address of that server's gRPC port, as host:port."
    )
    engine_ca: Path | None = Field(
        None, description="PEM file with the CA of its certificate; without it, plaintext."
    )
    engine_timeout_s: Seconds = Field(
        30.0, description="Longest time an answer of it takes, in seconds."
    )
    kserve_http_port: Port | None = Field(
        None, description="Port of the Open Inference Protocol over REST; by default none."
    )
    kserve_grpc_port: Port | None = Field(
        None, description="Port of the Open Inference Protocol over gRPC; by default none."
    )
    kserve_model: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = Field(
        None, description="Name of the model in that protocol; by default prm or router."
    )
    kserve_max_rows: PositiveCount = Field(
        64, description="Rows that one request of that protocol may have."
    )

    @property
    def is_predictor(self) -> bool:
        """Whether the Open Inference Protocol is served."""
        return self.kserve_http_port is not None or self.kserve_grpc_port is not None

    @model_validator(mode="after")
    def _engine_is_whole(self) -> Self:
        if self.engine != "transformers":
            if self.engine_url is None:
                raise ValueError(
                    f"{variable_of('engine_url')}: is not set, but ARBITRAGE_ENGINE is "
                    f"{self.engine}; set it too"
                )
            return self
        for field in _REMOTE_FIELDS:
            if field in self.model_fields_set:
                raise ValueError(
                    f"{variable_of(field)}: is set, but ARBITRAGE_ENGINE is transformers, whose "
                    "model runs in this process; set ARBITRAGE_ENGINE, or do not set it"
                )
        return self

    @model_validator(mode="after")
    def _predictor_is_open(self) -> Self:
        closed = self.tls_client_ca is not None or bool(self.allowed_callers)
        for field in _PREDICTOR_FIELDS:
            if closed and getattr(self, field) is not None:
                raise ValueError(
                    f"{variable_of(field)}: is set, but callers must show a certificate, which "
                    "this protocol's ports do not ask for; set one of the two"
                )
        return self
