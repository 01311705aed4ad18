from arbitrage.v1 import orchestrator_pb2 as _orchestrator_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionRecord(_message.Message):
    __slots__ = ("step_committed", "finished", "ledger")
    STEP_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    step_committed: _orchestrator_pb2.StepCommitted
    finished: _orchestrator_pb2.Finished
    ledger: _orchestrator_pb2.Ledger
    def __init__(self, step_committed: _Optional[_Union[_orchestrator_pb2.StepCommitted, _Mapping]] = ..., finished: _Optional[_Union[_orchestrator_pb2.Finished, _Mapping]] = ..., ledger: _Optional[_Union[_orchestrator_pb2.Ledger, _Mapping]] = ...) -> None: ...
