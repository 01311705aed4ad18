from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_UNSPECIFIED: _ClassVar[Source]
    SOURCE_DRAFT: _ClassVar[Source]
    SOURCE_TARGET: _ClassVar[Source]

class StopReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STOP_REASON_UNSPECIFIED: _ClassVar[StopReason]
    STOP_REASON_SEPARATOR: _ClassVar[StopReason]
    STOP_REASON_END_OF_SEQUENCE: _ClassVar[StopReason]
    STOP_REASON_STEP_LENGTH: _ClassVar[StopReason]
    STOP_REASON_TOTAL_LENGTH: _ClassVar[StopReason]
    STOP_REASON_STEP_LIMIT: _ClassVar[StopReason]
    STOP_REASON_REPETITION: _ClassVar[StopReason]
    STOP_REASON_DEADLINE: _ClassVar[StopReason]
    STOP_REASON_CANCELLED: _ClassVar[StopReason]
    STOP_REASON_ERROR: _ClassVar[StopReason]
SOURCE_UNSPECIFIED: Source
SOURCE_DRAFT: Source
SOURCE_TARGET: Source
STOP_REASON_UNSPECIFIED: StopReason
STOP_REASON_SEPARATOR: StopReason
STOP_REASON_END_OF_SEQUENCE: StopReason
STOP_REASON_STEP_LENGTH: StopReason
STOP_REASON_TOTAL_LENGTH: StopReason
STOP_REASON_STEP_LIMIT: StopReason
STOP_REASON_REPETITION: StopReason
STOP_REASON_DEADLINE: StopReason
STOP_REASON_CANCELLED: StopReason
STOP_REASON_ERROR: StopReason

class ModelIdentity(_message.Message):
    __slots__ = ("model_id", "revision")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    revision: str
    def __init__(self, model_id: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("text", "source", "stop_reason")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    text: str
    source: Source
    stop_reason: StopReason
    def __init__(self, text: _Optional[str] = ..., source: _Optional[_Union[Source, str]] = ..., stop_reason: _Optional[_Union[StopReason, str]] = ...) -> None: ...

class SamplingConfig(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...
