from arbitrage.v1 import trajectory_pb2 as _trajectory_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScoreStepsRequest(_message.Message):
    __slots__ = ("problem", "steps", "skip_count")
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SKIP_COUNT_FIELD_NUMBER: _ClassVar[int]
    problem: str
    steps: _containers.RepeatedCompositeFieldContainer[_trajectory_pb2.Step]
    skip_count: int
    def __init__(self, problem: _Optional[str] = ..., steps: _Optional[_Iterable[_Union[_trajectory_pb2.Step, _Mapping]]] = ..., skip_count: _Optional[int] = ...) -> None: ...

class ScoreStepsResponse(_message.Message):
    __slots__ = ("scores", "prefill_token_count", "cached_token_count", "model")
    SCORES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    prefill_token_count: int
    cached_token_count: int
    model: _trajectory_pb2.ModelIdentity
    def __init__(self, scores: _Optional[_Iterable[float]] = ..., prefill_token_count: _Optional[int] = ..., cached_token_count: _Optional[int] = ..., model: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ...) -> None: ...

class GetPrmRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPrmResponse(_message.Message):
    __slots__ = ("model", "family", "max_context_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: _trajectory_pb2.ModelIdentity
    family: str
    max_context_tokens: int
    def __init__(self, model: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ..., family: _Optional[str] = ..., max_context_tokens: _Optional[int] = ...) -> None: ...
