"""Feedback records as one stream in Redis: orchestrators append, training reads.

The oldest records are dropped for new ones, so what training did not read in time is lost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

from google.protobuf.message import DecodeError

from arbitrage.v1 import feedback_pb2
from services.rpc.redis_client import Client

# One key has one slot, in a cluster too.
FEEDBACK_STREAM: Final = b"arbitrage:feedback"
RECORD_FIELD: Final = b"record"
_BATCH_COUNT: Final = 100


async def read_feedback_stream(client: Client) -> AsyncIterator[feedback_pb2.ObservedStep]:
    """Yields every record of the stream, the oldest first; none where there is no stream.

    Raises:
        ValueError: an entry is no record; names it.
        RedisError, OSError, TimeoutError: Redis does not answer, or not with a stream.
    """
    untyped: Any = client
    after = b"-"
    while batch := await untyped.xrange(FEEDBACK_STREAM, min=after, count=_BATCH_COUNT):
        for entry_id, fields in batch:
            try:
                yield feedback_pb2.ObservedStep.FromString(fields[RECORD_FIELD])
            except (KeyError, DecodeError) as error:
                raise ValueError(
                    f"entry {entry_id.decode()} of {FEEDBACK_STREAM.decode()} is no record "
                    f"({type(error).__name__})"
                ) from None
        after = b"(" + entry_id
