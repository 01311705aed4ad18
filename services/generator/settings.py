"""Settings of the generator service."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from services.rpc.remote_settings import RemoteSettings
from services.rpc.settings import PositiveCount, Seconds, check_needs, variable_of

_PORTS = {"draft": 50051, "target": 50052}
# What says something about another server, and nothing about a model in this process.
_REMOTE_FIELDS = (
    "engine_url",
    "engine_api_key_file",
    "engine_ca",
    "engine_tokenizer",
    "engine_max_context_tokens",
    "engine_revision",
    "engine_top_logprobs",
    "engine_silence_timeout_s",
)


class GeneratorSettings(RemoteSettings):
    """What a generator can be told.

    The port follows the role unless it is set: 50051 for the draft, 50052 for the target.
    """

    role: Literal["draft", "target"] = Field(
        description="Which deployment this is; sets the default port and the metrics' label."
    )
    default_max_step_tokens: PositiveCount = Field(
        256, description="Token bound of a step whose request sets none."
    )
    engine: Literal["transformers", "openai", "tgi"] = Field(
        "transformers",
        description="What runs the model: transformers in this process, or another server that "
        "speaks the OpenAI completions API or TGI's; ARBITRAGE_MODEL is then that server's name "
        "for the model.",
    )
    engine_prompt: Literal["plain", "chat"] = Field(
        "plain",
        description="How a problem is put to the model: as it is, or in its chat template; "
        "instruct models want chat.",
    )
    engine_top_logprobs: int = Field(
        5,
        ge=0,
        le=100,
        description="Likeliest tokens whose log-probabilities make up a first-token entropy; 0 "
        "asks for none.",
    )
    engine_silence_timeout_s: Seconds = Field(
        60.0, description="Time after which a server that sends nothing is given up, in seconds."
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

    @model_validator(mode="after")
    def _engine_is_whole(self) -> Self:
        if self.engine == "transformers":
            for field in _REMOTE_FIELDS:
                if field in self.model_fields_set:
                    raise ValueError(
                        f"{variable_of(field)}: is set, but ARBITRAGE_ENGINE is transformers, "
                        "whose model runs in this process; set ARBITRAGE_ENGINE, or do not set it"
                    )
        elif self.engine_url is None:
            raise ValueError(
                f"{variable_of('engine_url')}: is not set, but ARBITRAGE_ENGINE is {self.engine}; "
                "set it too"
            )
        elif self.engine_prompt == "chat":
            check_needs(self, "engine_prompt", "engine_tokenizer")
        return self
