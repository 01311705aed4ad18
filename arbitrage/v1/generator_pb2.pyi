import datetime

from arbitrage.v1 import trajectory_pb2 as _trajectory_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateStepRequest(_message.Message):
    __slots__ = ("problem", "steps", "sampling", "max_tokens", "entropy_token_count", "stream_text", "time_limit")
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    STREAM_TEXT_FIELD_NUMBER: _ClassVar[int]
    TIME_LIMIT_FIELD_NUMBER: _ClassVar[int]
    problem: str
    steps: _containers.RepeatedCompositeFieldContainer[_trajectory_pb2.Step]
    sampling: _trajectory_pb2.SamplingConfig
    max_tokens: int
    entropy_token_count: int
    stream_text: bool
    time_limit: _duration_pb2.Duration
    def __init__(self, problem: _Optional[str] = ..., steps: _Optional[_Iterable[_Union[_trajectory_pb2.Step, _Mapping]]] = ..., sampling: _Optional[_Union[_trajectory_pb2.SamplingConfig, _Mapping]] = ..., max_tokens: _Optional[int] = ..., entropy_token_count: _Optional[int] = ..., stream_text: bool = ..., time_limit: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GenerateStepResponse(_message.Message):
    __slots__ = ("text_delta", "result")
    TEXT_DELTA_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    text_delta: str
    result: GeneratedStep
    def __init__(self, text_delta: _Optional[str] = ..., result: _Optional[_Union[GeneratedStep, _Mapping]] = ...) -> None: ...

class GeneratedStep(_message.Message):
    __slots__ = ("text", "stop_reason", "token_count", "first_token_entropy", "prefill_token_count", "cached_token_count", "model")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    text: str
    stop_reason: _trajectory_pb2.StopReason
    token_count: int
    first_token_entropy: float
    prefill_token_count: int
    cached_token_count: int
    model: _trajectory_pb2.ModelIdentity
    def __init__(self, text: _Optional[str] = ..., stop_reason: _Optional[_Union[_trajectory_pb2.StopReason, str]] = ..., token_count: _Optional[int] = ..., first_token_entropy: _Optional[float] = ..., prefill_token_count: _Optional[int] = ..., cached_token_count: _Optional[int] = ..., model: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ...) -> None: ...

class GetGeneratorRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetGeneratorResponse(_message.Message):
    __slots__ = ("model", "max_context_tokens", "separator")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEPARATOR_FIELD_NUMBER: _ClassVar[int]
    model: _trajectory_pb2.ModelIdentity
    max_context_tokens: int
    separator: str
    def __init__(self, model: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ..., max_context_tokens: _Optional[int] = ..., separator: _Optional[str] = ...) -> None: ...
