import datetime

from arbitrage.v1 import generator_pb2 as _generator_pb2
from arbitrage.v1 import trajectory_pb2 as _trajectory_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ObservedStep(_message.Message):
    __slots__ = ("request_id", "observed_at", "problem", "steps", "draft_step", "target_steps", "draft_score", "target_scores", "prm", "router", "router_score", "threshold", "escalated", "propensity", "sampling", "code_version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_AT_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_STEP_FIELD_NUMBER: _ClassVar[int]
    TARGET_STEPS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_SCORE_FIELD_NUMBER: _ClassVar[int]
    TARGET_SCORES_FIELD_NUMBER: _ClassVar[int]
    PRM_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    ROUTER_SCORE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ESCALATED_FIELD_NUMBER: _ClassVar[int]
    PROPENSITY_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CODE_VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    observed_at: _timestamp_pb2.Timestamp
    problem: str
    steps: _containers.RepeatedCompositeFieldContainer[_trajectory_pb2.Step]
    draft_step: _generator_pb2.GeneratedStep
    target_steps: _containers.RepeatedCompositeFieldContainer[_generator_pb2.GeneratedStep]
    draft_score: float
    target_scores: _containers.RepeatedScalarFieldContainer[float]
    prm: _trajectory_pb2.ModelIdentity
    router: _trajectory_pb2.ModelIdentity
    router_score: float
    threshold: float
    escalated: bool
    propensity: float
    sampling: _trajectory_pb2.SamplingConfig
    code_version: str
    def __init__(self, request_id: _Optional[str] = ..., observed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., problem: _Optional[str] = ..., steps: _Optional[_Iterable[_Union[_trajectory_pb2.Step, _Mapping]]] = ..., draft_step: _Optional[_Union[_generator_pb2.GeneratedStep, _Mapping]] = ..., target_steps: _Optional[_Iterable[_Union[_generator_pb2.GeneratedStep, _Mapping]]] = ..., draft_score: _Optional[float] = ..., target_scores: _Optional[_Iterable[float]] = ..., prm: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ..., router: _Optional[_Union[_trajectory_pb2.ModelIdentity, _Mapping]] = ..., router_score: _Optional[float] = ..., threshold: _Optional[float] = ..., escalated: bool = ..., propensity: _Optional[float] = ..., sampling: _Optional[_Union[_trajectory_pb2.SamplingConfig, _Mapping]] = ..., code_version: _Optional[str] = ...) -> None: ...
