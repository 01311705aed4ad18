"""Settings of the router service."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from services.rpc.model_program import ModelSettings
from services.rpc.settings import Port


class RouterSettings(ModelSettings):
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
    model_cache: Path | None = Field(
        None, description="Folder for routers fetched from a URL; by default a temporary one."
    )
