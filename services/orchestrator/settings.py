"""Settings of the orchestrator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_core import PydanticCustomError

from arbitrage.core.limits import Budgets, Caps
from arbitrage.core.shown import shown
from arbitrage.core.speculation import RouterFallback
from services.orchestrator.feedback import FeedbackRules
from services.orchestrator.quotas import Limits
from services.orchestrator.sessions import SessionRules
from services.rpc.addresses import FORMS, malformed_part
from services.rpc.calls import CallLimits
from services.rpc.settings import (
    Port,
    PositiveCount,
    Seconds,
    ServerSettings,
    check_needs,
    check_pair,
    variable_of,
)
from services.rpc.tls import TlsFiles, client_files


def _checked_address(address: str) -> str:
    part = malformed_part(address)
    if part is not None:
        which = "" if part == address else ", which {part} is not"
        raise PydanticCustomError("address", f"{FORMS}{which}", {"part": shown(part)})
    return address


Address = Annotated[str, Field(min_length=1), AfterValidator(_checked_address)]
_MIB = 1 << 20


class OrchestratorSettings(ServerSettings):
    """What an orchestrator can be told.

    Draft and target are needed. Without a PRM or a router, the policies that ask them are not
    offered.
    """

    port: Port = Field(50050, description="Port of the gRPC server; 0 takes a free one.")
    draft_address: Address = Field(
        description="Where the draft is: host:port, several of them, or file:///path."
    )
    target_address: Address = Field(
        description="Where the target is: host:port, several of them, or file:///path."
    )
    prm_address: Address | None = Field(
        None, description="Where the PRM is: host:port, several of them, or file:///path."
    )
    router_address: Address | None = Field(
        None, description="Where the router is: host:port, several of them, or file:///path."
    )

    max_steps: PositiveCount = Field(256, description="Most steps a request may ask for.")
    max_tokens: PositiveCount = Field(32_768, description="Most tokens it may ask for.")
    max_step_tokens: PositiveCount = Field(4_096, description="Most tokens of one step.")
    max_time_limit_s: Seconds = Field(3_600.0, description="Longest time limit, in seconds.")
    max_problem_bytes: PositiveCount = Field(
        262_144, description="Longest problem, in UTF-8 bytes."
    )

    default_steps: PositiveCount = Field(32, description="Steps of a request that says nothing.")
    default_tokens: PositiveCount = Field(2_048, description="Tokens of such a request.")
    default_step_tokens: PositiveCount = Field(256, description="Tokens of each of its steps.")
    default_time_limit_s: Seconds | None = Field(
        None, description="Its time limit, in seconds; by default none."
    )

    router_fallback: RouterFallback = Field(
        RouterFallback.ACCEPT_DRAFT,
        description="What becomes of a draft step that the router cannot judge.",
    )
    resolve_interval_s: Seconds = Field(
        2.0, description="How often the replicas of a model are looked up, in seconds."
    )
    hedge_quantile: float = Field(
        0.0,
        ge=0,
        le=0.99,
        allow_inf_nan=False,
        description="A model call that takes longer than this share of the latest ones is asked of "
        "a second replica too, and the first answer counts; usually 0.95, 0 turns it off.",
    )
    max_connection_age_s: Seconds = Field(
        300.0,
        description="Time after which a caller connects anew, and so finds orchestrators that have "
        "come since, in seconds; what runs goes on.",
    )
    max_concurrency: PositiveCount = Field(64, description="Solutions that run together.")
    max_queue: int = Field(256, ge=0, description="Solutions that may wait; more are refused.")
    tenant_max_share: float = Field(
        1.0,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Share of the places, and of the queue, that one tenant may have.",
    )
    target_step_capacity: PositiveCount | None = Field(
        None,
        description="Steps that all replicas of the target write well at once; with more, the "
        "thresholds of callers that allow it rise. By default none does.",
    )
    default_requests_per_minute: PositiveCount | None = Field(
        None, description="Requests a minute of a tenant whose key has no limit; by default any."
    )
    default_tokens_per_minute: PositiveCount | None = Field(
        None, description="Tokens a minute of such a tenant; by default any."
    )
    call_timeout_s: Seconds = Field(120.0, description="Longest model call, in seconds.")
    call_grace_s: Seconds = Field(
        2.0, description="Time a model call gets beyond its time limit, in seconds."
    )
    store_url: SecretStr | None = Field(
        None,
        description="Redis that orchestrators share, as redis://, rediss://, unix://, "
        "redis+sentinel:// or redis+cluster://; by default each has its own memory.",
    )
    # A step takes tens of milliseconds at least: a store much slower than that is of no use.
    store_timeout_s: Seconds = Field(
        0.25, description="Longest time an answer of that Redis is waited for, in seconds."
    )
    prefix_cache_mib: int = Field(
        64,
        ge=0,
        description="Memory of the prefix cache, in MiB; 0 turns it off. In Redis, the server's "
        "maxmemory is the bound.",
    )
    prefix_cache_ttl_s: Seconds = Field(
        3_600.0, description="Time an answer stays in the prefix cache, in seconds."
    )

    session_lease_s: Seconds = Field(
        3.0,
        description="Time after which a silent orchestrator's sessions are others', in seconds.",
    )
    session_ttl_s: Seconds = Field(
        86_400.0, description="Time a session is kept after its last step, in seconds."
    )
    session_patience_s: Seconds = Field(
        10.0, description="Time a committed step waits for a store that is away, in seconds."
    )
    api_keys_file: Path | None = Field(
        None, description="TOML file with the API keys that callers need; by default none."
    )
    models_tls_ca: Path | None = Field(
        None,
        description="PEM file with the CA of the models' certificates; without it, plaintext.",
    )
    models_tls_certificate: Path | None = Field(
        None, description="PEM file with the certificate that models are shown."
    )
    models_tls_key: Path | None = Field(None, description="PEM file with its private key.")

    feedback_sample_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of routed steps that are observed for training, usually 0.01 to 0.05.",
    )
    feedback_folder: Path | None = Field(
        None,
        description="Folder that gets what was observed, as JSON lines; without it, a stream in "
        "the Redis of ARBITRAGE_STORE_URL does.",
    )
    feedback_file_mib: PositiveCount = Field(64, description="Size of a file of it, in MiB.")
    feedback_stream_mib: PositiveCount = Field(
        64, description="Size of that stream, in MiB; the oldest records are dropped for new ones."
    )
    feedback_max_inflight: PositiveCount = Field(1, description="Steps observed at once.")
    feedback_max_target_inflight: PositiveCount = Field(
        1, description="Nothing is observed while the target writes this many steps."
    )
    feedback_seed: int = Field(0, ge=0, description="Decides which steps are observed.")

    @property
    def connection_age_s(self) -> float:
        """Time after which a caller connects anew, in seconds."""
        return self.max_connection_age_s

    @property
    def feedback_rules(self) -> FeedbackRules:
        """Which steps are observed."""
        return FeedbackRules(
            self.feedback_sample_rate,
            self.feedback_max_inflight,
            self.feedback_max_target_inflight,
            self.feedback_seed,
        )

    @property
    def session_rules(self) -> SessionRules:
        """The times of sessions."""
        return SessionRules(self.session_lease_s, self.session_ttl_s, self.session_patience_s)

    @property
    def default_limits(self) -> Limits:
        """What a tenant may use in a minute whose key says nothing of it."""
        return Limits(self.default_requests_per_minute, self.default_tokens_per_minute)

    @property
    def models_tls(self) -> TlsFiles | None:
        """The files that model services are reached with; None is plaintext."""
        return client_files(self, "models_tls")

    @property
    def caps(self) -> Caps:
        """The most a caller may ask for."""
        return Caps(
            self.max_steps,
            self.max_tokens,
            self.max_step_tokens,
            self.max_time_limit_s,
            self.max_problem_bytes,
        )

    @property
    def default_budgets(self) -> Budgets:
        """The budgets of a request that sets none."""
        return Budgets(
            self.default_steps,
            self.default_tokens,
            self.default_step_tokens,
            time_limit_s=self.default_time_limit_s,
        )

    @property
    def call_limits(self) -> CallLimits:
        """How long a model call may take."""
        return CallLimits(self.call_timeout_s, self.call_grace_s)

    @property
    def feedback_stream_bytes(self) -> int:
        """Size of the stream of feedback records in Redis."""
        return self.feedback_stream_mib * _MIB

    @property
    def prefix_cache_bytes(self) -> int:
        """Memory of the prefix cache."""
        return self.prefix_cache_mib * _MIB

    @model_validator(mode="after")
    def _models_tls_is_whole(self) -> Self:
        check_pair(self, "models_tls")
        check_needs(self, "models_tls_certificate", "models_tls_ca")
        return self

    @model_validator(mode="after")
    def _feedback_has_what_it_needs(self) -> Self:
        if not self.feedback_sample_rate:
            return self
        for needed, other in (
            ("feedback_folder", "store_url"),
            ("prm_address", None),
            ("router_address", None),
        ):
            if getattr(self, needed) is None and (other is None or getattr(self, other) is None):
                instead = "" if other is None else f" or {variable_of(other)}"
                raise ValueError(
                    f"{variable_of(needed)}: is not set, but {variable_of('feedback_sample_rate')} "
                    f"is {self.feedback_sample_rate:g}; set it{instead}, or the rate to 0"
                )
        return self

    @model_validator(mode="after")
    def _sessions_outlive_answers(self) -> Self:
        # A Redis that is full drops what is nearest to its end.
        if self.store_url is not None and self.session_ttl_s < self.prefix_cache_ttl_s:
            raise ValueError(
                f"{variable_of('session_ttl_s')}: expected at least "
                f"{variable_of('prefix_cache_ttl_s')} ({self.prefix_cache_ttl_s:g}), so that a "
                f"full Redis drops answers before sessions, got {self.session_ttl_s:g}"
            )
        return self

    @model_validator(mode="after")
    def _defaults_lie_within_the_caps(self) -> Self:
        for default, cap in (
            ("default_steps", "max_steps"),
            ("default_tokens", "max_tokens"),
            ("default_step_tokens", "max_step_tokens"),
            ("default_time_limit_s", "max_time_limit_s"),
        ):
            value, most = getattr(self, default), getattr(self, cap)
            if value is not None and value > most:
                raise ValueError(
                    f"{variable_of(default)}: expected at most {variable_of(cap)} ({most:g}), "
                    f"got {value:g}"
                )
        return self
