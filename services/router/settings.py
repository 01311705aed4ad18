"""Settings of the router service."""

from __future__ import annotations

from pydantic import Field

from services.rpc.model_program import ModelSettings
from services.rpc.settings import Port


class RouterSettings(ModelSettings):
    """What a router can be told."""

    port: Port = Field(50054, description="Port of the gRPC server; 0 takes a free one.")
