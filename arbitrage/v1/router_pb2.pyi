from arbitrage.v1 import trajectory_pb2 as _trajectory_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EstimateAdvantageRequest(_message.Message):
    __slots__ = ("problem", "steps", "candidate")
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    problem: str
    steps: _containers.RepeatedCompositeFieldContainer[_trajectory_pb2.Step]
    candidate: str
    def __init__(self, problem: _Optional[str] = ..., steps: _Optional[_Iterable[_Union[_trajectory_pb2.Step, _Mapping]]] = ..., candidate: _Optional[str] = ...) -> None: ...

class EstimateAdvantageResponse(_message.Message):
    __slots__ = ("score", "prefill_token_count", "cached_token_count", "truncated_token_count", "model")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    score: float
    prefill_token_count: int
    cached_token_count: int
    truncated_token_count: int
    model: _trajectory_pb2.ModelIdentity
    def __init__(self, score: _Optional[float] = ..., prefill_token_count: _Optional[int] = ..., cached_token_count: _Optional[int] = ..., truncated_token_count: _Optional[int] = ..., model: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ...) -> None: ...

class GetRouterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRouterResponse(_message.Message):
    __slots__ = ("model", "default_threshold", "calibration", "annotated", "score_rule", "prior_logit_shift", "advantage_margin", "rejected_revision", "rejected_reason")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    ANNOTATED_FIELD_NUMBER: _ClassVar[int]
    SCORE_RULE_FIELD_NUMBER: _ClassVar[int]
    PRIOR_LOGIT_SHIFT_FIELD_NUMBER: _ClassVar[int]
    ADVANTAGE_MARGIN_FIELD_NUMBER: _ClassVar[int]
    REJECTED_REVISION_FIELD_NUMBER: _ClassVar[int]
    REJECTED_REASON_FIELD_NUMBER: _ClassVar[int]
    model: _trajectory_pb2.ModelIdentity
    default_threshold: float
    calibration: _containers.RepeatedCompositeFieldContainer[CalibrationPoint]
    annotated: bool
    score_rule: str
    prior_logit_shift: float
    advantage_margin: float
    rejected_revision: str
    rejected_reason: str
    def __init__(self, model: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ..., default_threshold: _Optional[float] = ..., calibration: _Optional[_Iterable[_Union[CalibrationPoint, _Mapping]]] = ..., annotated: bool = ..., score_rule: _Optional[str] = ..., prior_logit_shift: _Optional[float] = ..., advantage_margin: _Optional[float] = ..., rejected_revision: _Optional[str] = ..., rejected_reason: _Optional[str] = ...) -> None: ...

class CalibrationPoint(_message.Message):
    __slots__ = ("threshold", "target_share")
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    TARGET_SHARE_FIELD_NUMBER: _ClassVar[int]
    threshold: float
    target_share: float
    def __init__(self, threshold: _Optional[float] = ..., target_share: _Optional[float] = ...) -> None: ...
