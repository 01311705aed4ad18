"""Settings of the generator service."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from services.rpc.model_program import ModelSettings
from services.rpc.settings import PositiveCount

_PORTS = {"draft": 50051, "target": 50052}


class GeneratorSettings(ModelSettings):
    """What a generator can be told.

    The port follows the role unless it is set: 50051 for the draft, 50052 for the target.
    """

    role: Literal["draft", "target"] = Field(
        description="Which deployment this is; sets the default port and the metrics' label."
    )
    default_max_step_tokens: PositiveCount = Field(
        256, description="Token bound of a step whose request sets none."
    )

    @property
    def deployment(self) -> str:
        """The role."""
        return self.role

    @model_validator(mode="before")
    @classmethod
    def _port_of_role(cls, given: dict[str, Any]) -> dict[str, Any]:
        # A bad or missing role is reported as such, so any port will do beside it.
        return {"port": _PORTS.get(str(given.get("role")), 0), **given}
