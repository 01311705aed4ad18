"""Settings of the router service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from services.rpc.judge_settings import JudgeSettings
from services.rpc.settings import Port, variable_of


class RouterSettings(JudgeSettings):
    """What a router can be told.

    `model` may also be a location that routers are promoted to: a folder, or a URL that fsspec
    knows. SIGHUP looks for a new revision at once.
    """

    port: Port = Field(50054, description="Port of the gRPC server; 0 takes a free one.")
    reload_interval_s: float = Field(
        10.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="Time between looks for a promoted router, in seconds; 0 never looks.",
    )
    engine: Literal["transformers", "oip"] = Field(
        "transformers",
        description="What runs the model: transformers in this process, or a server of the Open "
        "Inference Protocol (KServe, Triton, MLServer); ARBITRAGE_MODEL is then its name there.",
    )
    engine_router_json: Path | None = Field(
        None,
        description="router.json of the checkpoint that another server runs: how its scores are "
        "read. Needed with ARBITRAGE_ENGINE=oip.",
    )
    model_cache: Path | None = Field(
        None, description="Folder for routers fetched from a URL; by default a temporary one."
    )

    @model_validator(mode="after")
    def _remote_router_is_described(self) -> Self:
        if (self.engine == "transformers") != (self.engine_router_json is None):
            raise ValueError(
                f"{variable_of('engine_router_json')}: goes with ARBITRAGE_ENGINE=oip; set both or "
                "neither"
            )
        return self
