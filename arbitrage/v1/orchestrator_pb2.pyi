import datetime

from arbitrage.v1 import trajectory_pb2 as _trajectory_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChatRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHAT_ROLE_UNSPECIFIED: _ClassVar[ChatRole]
    CHAT_ROLE_SYSTEM: _ClassVar[ChatRole]
    CHAT_ROLE_USER: _ClassVar[ChatRole]
    CHAT_ROLE_ASSISTANT: _ClassVar[ChatRole]

class Degradation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEGRADATION_UNSPECIFIED: _ClassVar[Degradation]
    DEGRADATION_TARGET_UNAVAILABLE: _ClassVar[Degradation]
    DEGRADATION_ROUTER_UNAVAILABLE: _ClassVar[Degradation]
    DEGRADATION_DRAFT_UNAVAILABLE: _ClassVar[Degradation]
    DEGRADATION_TARGET_BUDGET: _ClassVar[Degradation]
    DEGRADATION_LOAD_PRICED_THRESHOLD: _ClassVar[Degradation]
CHAT_ROLE_UNSPECIFIED: ChatRole
CHAT_ROLE_SYSTEM: ChatRole
CHAT_ROLE_USER: ChatRole
CHAT_ROLE_ASSISTANT: ChatRole
DEGRADATION_UNSPECIFIED: Degradation
DEGRADATION_TARGET_UNAVAILABLE: Degradation
DEGRADATION_ROUTER_UNAVAILABLE: Degradation
DEGRADATION_DRAFT_UNAVAILABLE: Degradation
DEGRADATION_TARGET_BUDGET: Degradation
DEGRADATION_LOAD_PRICED_THRESHOLD: Degradation

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: ChatRole
    content: str
    def __init__(self, role: _Optional[_Union[ChatRole, str]] = ..., content: _Optional[str] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ArbitragePolicy(_message.Message):
    __slots__ = ("escalation_threshold", "target_share", "max_escalation_threshold")
    ESCALATION_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    TARGET_SHARE_FIELD_NUMBER: _ClassVar[int]
    MAX_ESCALATION_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    escalation_threshold: float
    target_share: float
    max_escalation_threshold: float
    def __init__(self, escalation_threshold: _Optional[float] = ..., target_share: _Optional[float] = ..., max_escalation_threshold: _Optional[float] = ...) -> None: ...

class RsdPolicy(_message.Message):
    __slots__ = ("acceptance_score",)
    ACCEPTANCE_SCORE_FIELD_NUMBER: _ClassVar[int]
    acceptance_score: float
    def __init__(self, acceptance_score: _Optional[float] = ...) -> None: ...

class OraclePolicy(_message.Message):
    __slots__ = ("advantage_threshold",)
    ADVANTAGE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    advantage_threshold: float
    def __init__(self, advantage_threshold: _Optional[float] = ...) -> None: ...

class RandomPolicy(_message.Message):
    __slots__ = ("escalation_rate", "seed")
    ESCALATION_RATE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    escalation_rate: float
    seed: int
    def __init__(self, escalation_rate: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class DraftOnlyPolicy(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TargetOnlyPolicy(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FirstTokenEntropyPolicy(_message.Message):
    __slots__ = ("entropy_threshold", "token_count")
    ENTROPY_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    entropy_threshold: float
    token_count: int
    def __init__(self, entropy_threshold: _Optional[float] = ..., token_count: _Optional[int] = ...) -> None: ...

class Budgets(_message.Message):
    __slots__ = ("max_steps", "max_tokens", "max_step_tokens", "max_target_steps", "time_limit")
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TARGET_STEPS_FIELD_NUMBER: _ClassVar[int]
    TIME_LIMIT_FIELD_NUMBER: _ClassVar[int]
    max_steps: int
    max_tokens: int
    max_step_tokens: int
    max_target_steps: int
    time_limit: _duration_pb2.Duration
    def __init__(self, max_steps: _Optional[int] = ..., max_tokens: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., max_target_steps: _Optional[int] = ..., time_limit: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GenerateSolutionRequest(_message.Message):
    __slots__ = ("problem", "chat", "arbitrage", "rsd", "oracle", "random", "draft_only", "target_only", "first_token_entropy", "sampling", "budgets", "allow_degraded", "request_id", "resume_after_step", "stream_text")
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    ARBITRAGE_FIELD_NUMBER: _ClassVar[int]
    RSD_FIELD_NUMBER: _ClassVar[int]
    ORACLE_FIELD_NUMBER: _ClassVar[int]
    RANDOM_FIELD_NUMBER: _ClassVar[int]
    DRAFT_ONLY_FIELD_NUMBER: _ClassVar[int]
    TARGET_ONLY_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_DEGRADED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    STREAM_TEXT_FIELD_NUMBER: _ClassVar[int]
    problem: str
    chat: Chat
    arbitrage: ArbitragePolicy
    rsd: RsdPolicy
    oracle: OraclePolicy
    random: RandomPolicy
    draft_only: DraftOnlyPolicy
    target_only: TargetOnlyPolicy
    first_token_entropy: FirstTokenEntropyPolicy
    sampling: _trajectory_pb2.SamplingConfig
    budgets: Budgets
    allow_degraded: bool
    request_id: str
    resume_after_step: int
    stream_text: bool
    def __init__(self, problem: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., arbitrage: _Optional[_Union[ArbitragePolicy, _Mapping]] = ..., rsd: _Optional[_Union[RsdPolicy, _Mapping]] = ..., oracle: _Optional[_Union[OraclePolicy, _Mapping]] = ..., random: _Optional[_Union[RandomPolicy, _Mapping]] = ..., draft_only: _Optional[_Union[DraftOnlyPolicy, _Mapping]] = ..., target_only: _Optional[_Union[TargetOnlyPolicy, _Mapping]] = ..., first_token_entropy: _Optional[_Union[FirstTokenEntropyPolicy, _Mapping]] = ..., sampling: _Optional[_Union[_trajectory_pb2.SamplingConfig, _Mapping]] = ..., budgets: _Optional[_Union[Budgets, _Mapping]] = ..., allow_degraded: bool = ..., request_id: _Optional[str] = ..., resume_after_step: _Optional[int] = ..., stream_text: bool = ...) -> None: ...

class GenerateSolutionResponse(_message.Message):
    __slots__ = ("draft_proposed", "token_delta", "step_committed", "finished")
    DRAFT_PROPOSED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_DELTA_FIELD_NUMBER: _ClassVar[int]
    STEP_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    draft_proposed: DraftProposed
    token_delta: TokenDelta
    step_committed: StepCommitted
    finished: Finished
    def __init__(self, draft_proposed: _Optional[_Union[DraftProposed, _Mapping]] = ..., token_delta: _Optional[_Union[TokenDelta, _Mapping]] = ..., step_committed: _Optional[_Union[StepCommitted, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class DraftProposed(_message.Message):
    __slots__ = ("step_index", "text", "token_count")
    STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    step_index: int
    text: str
    token_count: int
    def __init__(self, step_index: _Optional[int] = ..., text: _Optional[str] = ..., token_count: _Optional[int] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("step_index", "source", "text")
    STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    step_index: int
    source: _trajectory_pb2.Source
    text: str
    def __init__(self, step_index: _Optional[int] = ..., source: _Optional[_Union[_trajectory_pb2.Source, str]] = ..., text: _Optional[str] = ...) -> None: ...

class StepCommitted(_message.Message):
    __slots__ = ("step_index", "step", "token_count", "router_score", "draft_score", "target_score", "first_token_entropy", "threshold", "router", "prm", "writer", "escalated", "degradations", "draft_time", "decision_time", "target_time", "elapsed")
    STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    ROUTER_SCORE_FIELD_NUMBER: _ClassVar[int]
    DRAFT_SCORE_FIELD_NUMBER: _ClassVar[int]
    TARGET_SCORE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    PRM_FIELD_NUMBER: _ClassVar[int]
    WRITER_FIELD_NUMBER: _ClassVar[int]
    ESCALATED_FIELD_NUMBER: _ClassVar[int]
    DEGRADATIONS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TIME_FIELD_NUMBER: _ClassVar[int]
    DECISION_TIME_FIELD_NUMBER: _ClassVar[int]
    TARGET_TIME_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    step_index: int
    step: _trajectory_pb2.Step
    token_count: int
    router_score: float
    draft_score: float
    target_score: float
    first_token_entropy: float
    threshold: float
    router: _trajectory_pb2.ModelIdentity
    prm: _trajectory_pb2.ModelIdentity
    writer: _trajectory_pb2.ModelIdentity
    escalated: bool
    degradations: _containers.RepeatedScalarFieldContainer[Degradation]
    draft_time: _duration_pb2.Duration
    decision_time: _duration_pb2.Duration
    target_time: _duration_pb2.Duration
    elapsed: _duration_pb2.Duration
    def __init__(self, step_index: _Optional[int] = ..., step: _Optional[_Union[_trajectory_pb2.Step, _Mapping]] = ..., token_count: _Optional[int] = ..., router_score: _Optional[float] = ..., draft_score: _Optional[float] = ..., target_score: _Optional[float] = ..., first_token_entropy: _Optional[float] = ..., threshold: _Optional[float] = ..., router: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ..., prm: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ..., writer: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ..., escalated: bool = ..., degradations: _Optional[_Iterable[_Union[Degradation, str]]] = ..., draft_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., decision_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., target_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., elapsed: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class TokenLedger(_message.Message):
    __slots__ = ("kept_count", "discarded_count", "cancelled_count", "prefill_count", "cached_count", "call_count", "time")
    KEPT_COUNT_FIELD_NUMBER: _ClassVar[int]
    DISCARDED_COUNT_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_COUNT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_COUNT_FIELD_NUMBER: _ClassVar[int]
    CALL_COUNT_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    kept_count: int
    discarded_count: int
    cancelled_count: int
    prefill_count: int
    cached_count: int
    call_count: int
    time: _duration_pb2.Duration
    def __init__(self, kept_count: _Optional[int] = ..., discarded_count: _Optional[int] = ..., cancelled_count: _Optional[int] = ..., prefill_count: _Optional[int] = ..., cached_count: _Optional[int] = ..., call_count: _Optional[int] = ..., time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Ledger(_message.Message):
    __slots__ = ("draft", "target", "prm", "router", "step_count", "routed_step_count", "escalation_count", "degraded_step_count", "elapsed", "orchestrator_time")
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PRM_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    ROUTED_STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    ESCALATION_COUNT_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    ORCHESTRATOR_TIME_FIELD_NUMBER: _ClassVar[int]
    draft: TokenLedger
    target: TokenLedger
    prm: TokenLedger
    router: TokenLedger
    step_count: int
    routed_step_count: int
    escalation_count: int
    degraded_step_count: int
    elapsed: _duration_pb2.Duration
    orchestrator_time: _duration_pb2.Duration
    def __init__(self, draft: _Optional[_Union[TokenLedger, _Mapping]] = ..., target: _Optional[_Union[TokenLedger, _Mapping]] = ..., prm: _Optional[_Union[TokenLedger, _Mapping]] = ..., router: _Optional[_Union[TokenLedger, _Mapping]] = ..., step_count: _Optional[int] = ..., routed_step_count: _Optional[int] = ..., escalation_count: _Optional[int] = ..., degraded_step_count: _Optional[int] = ..., elapsed: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., orchestrator_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("stop_reason", "ledger", "escalation_rate")
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    ESCALATION_RATE_FIELD_NUMBER: _ClassVar[int]
    stop_reason: _trajectory_pb2.StopReason
    ledger: Ledger
    escalation_rate: float
    def __init__(self, stop_reason: _Optional[_Union[_trajectory_pb2.StopReason, str]] = ..., ledger: _Optional[_Union[Ledger, _Mapping]] = ..., escalation_rate: _Optional[float] = ...) -> None: ...

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RoleModel(_message.Message):
    __slots__ = ("role", "model", "available")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    role: str
    model: _trajectory_pb2.ModelIdentity
    available: bool
    def __init__(self, role: _Optional[str] = ..., model: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ..., available: bool = ...) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("models", "policies", "max_problem_bytes", "default_budgets", "budget_caps", "default_escalation_threshold", "resumable")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    MAX_PROBLEM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_BUDGETS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_CAPS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_ESCALATION_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    RESUMABLE_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[RoleModel]
    policies: _containers.RepeatedScalarFieldContainer[str]
    max_problem_bytes: int
    default_budgets: Budgets
    budget_caps: Budgets
    default_escalation_threshold: float
    resumable: bool
    def __init__(self, models: _Optional[_Iterable[_Union[RoleModel, _Mapping]]] = ..., policies: _Optional[_Iterable[str]] = ..., max_problem_bytes: _Optional[int] = ..., default_budgets: _Optional[_Union[Budgets, _Mapping]] = ..., budget_caps: _Optional[_Union[Budgets, _Mapping]] = ..., default_escalation_threshold: _Optional[float] = ..., resumable: bool = ...) -> None: ...
