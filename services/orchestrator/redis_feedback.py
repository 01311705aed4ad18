"""The sink of feedback records in the Redis that orchestrators share."""

from __future__ import annotations

from typing import Final

from arbitrage.v1 import feedback_pb2
from services.orchestrator.redis_link import RedisLink, Script
from services.rpc.feedback_stream import FEEDBACK_STREAM, RECORD_FIELD

# A stream that nobody adds to goes in the end; one that is used lives on, within its bound.
_TTL_S: Final = 7 * 86_400
# ARGV: name of the field, the record, bound in bytes, time to live in ms. Records differ too much
# in size for their number to bound what they take, so each entry says how much was written up to
# its end, and the oldest go while what lies behind them fills the bound alone.
_APPEND: Final = Script("""
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local written = #ARGV[2] + (last and last[2][4] or 0)
redis.call('XADD', KEYS[1], '*', ARGV[1], ARGV[2], 'written', written)
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
while written - first[2][4] >= tonumber(ARGV[3]) do
  redis.call('XDEL', KEYS[1], first[1])
  first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
""")


class RedisFeedback:
    """Appends records to one stream, which takes `max_bytes` and a record more at most."""

    def __init__(self, link: RedisLink, max_bytes: int) -> None:
        self._link = link
        self._max_bytes = max_bytes

    async def append(self, record: feedback_pb2.ObservedStep) -> None:
        """Adds one record.

        Raises:
            StoreAway: Redis is away or full.
        """
        arguments = (RECORD_FIELD, record.SerializeToString(), self._max_bytes, _TTL_S * 1000)
        await self._link.run("feedback", _APPEND, (FEEDBACK_STREAM,), arguments)
