"""Settings of the PRM service."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.rpc.judge_settings import JudgeSettings
from services.rpc.settings import Port


class PrmSettings(JudgeSettings):
    """What a PRM can be told."""

    port: Port = Field(50053, description="Port of the gRPC server; 0 takes a free one.")
    prm_family: (
        Literal[
            "skywork-o1-open-prm", "qwen2.5-math-prm", "math-shepherd", "trl-token-classification"
        ]
        | None
    ) = Field(None, description="Family of the model; by default the checkpoint tells.")
