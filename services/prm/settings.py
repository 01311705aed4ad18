"""Settings of the PRM service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from services.rpc.judge_settings import JudgeSettings
from services.rpc.remote_settings import RemoteSettings, http_url
from services.rpc.settings import Port, variable_of

# What says something about vLLM alone.
_VLLM_FIELDS = (
    "engine_api_key_file",
    "engine_tokenizer",
    "engine_max_context_tokens",
    "engine_revision",
)


class PrmSettings(RemoteSettings, JudgeSettings):
    """What a PRM can be told."""

    port: Port = Field(50053, description="Port of the gRPC server; 0 takes a free one.")
    engine: Literal["transformers", "oip", "vllm"] = Field(
        "transformers",
        description="What runs the model: transformers in this process, a server of the Open "
        "Inference Protocol (KServe, Triton, MLServer), or vLLM; ARBITRAGE_MODEL is then its name "
        "there.",
    )
    engine_url: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Address of that server: host:port of its gRPC port, or for vLLM what stands "
        "before /pooling.",
    )
    engine_ca: Path | None = Field(
        None,
        description="PEM file with the CA of its certificate; without it plaintext, or for vLLM "
        "the system's are believed.",
    )
    engine_tokenizer: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Tokenizer of the model on vLLM, which needs it: a folder, org/name@revision "
        "or a pack.",
    )
    prm_family: (
        Literal[
            "skywork-o1-open-prm", "qwen2.5-math-prm", "math-shepherd", "trl-token-classification"
        ]
        | None
    ) = Field(
        None,
        description="Family of the model; by default the checkpoint tells, or the tokenizer's "
        "folder.",
    )

    @field_validator("engine_url")
    @classmethod
    def _vllm_speaks_http(cls, url: str | None, info: ValidationInfo) -> str | None:
        return http_url(url) if url is not None and info.data.get("engine") == "vllm" else url

    @model_validator(mode="after")
    def _vllm_is_whole(self) -> Self:
        if self.engine == "vllm":
            if self.engine_tokenizer is None:
                raise ValueError(
                    f"{variable_of('engine_tokenizer')}: is not set, but ARBITRAGE_ENGINE is vllm; "
                    "set it too"
                )
            return self
        for field in _VLLM_FIELDS:
            if field in self.model_fields_set:
                raise ValueError(
                    f"{variable_of(field)}: goes with ARBITRAGE_ENGINE=vllm; set both or neither"
                )
        return self
