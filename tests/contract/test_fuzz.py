"""Whatever bytes arrive, they are answered for what they are: never with INTERNAL."""

from __future__ import annotations

import random
from typing import Any

import grpc.aio
import pytest

from arbitrage.core.errors import ArbitrageError
from arbitrage.status import CODES, from_rpc_error
from arbitrage.v1 import orchestrator_pb2 as pb
from arbitrage.v1.trajectory_pb2 import SamplingConfig
from tests.services.running import House, bytes_stream

METHOD = "/arbitrage.v1.OrchestratorService/GenerateSolution"
GOOD = pb.GenerateSolutionRequest(
    chat=pb.Chat(messages=[pb.ChatMessage(role=pb.CHAT_ROLE_USER, content="1 + 1?")]),
    arbitrage=pb.ArbitragePolicy(target_share=0.3),
    sampling=SamplingConfig(temperature=0.7, top_p=0.9, top_k=3, seed=1),
    budgets=pb.Budgets(max_steps=2, max_tokens=99, max_target_steps=1),
    allow_degraded=True,
    stream_text=True,
).SerializeToString()


def changed(coin: random.Random) -> bytes:
    """Returns a good request with a few bytes changed, cut out or put in."""
    request = bytearray(GOOD)
    for _ in range(coin.randint(1, 4)):
        at = coin.randrange(len(request))
        match coin.randrange(3):
            case 0:
                request[at] = coin.randrange(256)
            case 1:
                del request[at : at + coin.randint(1, 5)]
            case _:
                request[at:at] = coin.randbytes(coin.randint(1, 5))
        request = request or bytearray(b"\x00")
    return bytes(request)


async def answer_to(call: Any, request: bytes) -> ArbitrageError | None:
    """Returns the error that `request` ends with; None where it is served."""
    try:
        async for _ in call(request, timeout=20):
            pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    return None


@pytest.mark.parametrize(
    ("seed", "count"), [(7, 150), pytest.param(8, 2_000, marks=pytest.mark.slow)]
)
async def test_no_bytes_are_answered_with_internal(seed: int, count: int) -> None:
    coin = random.Random(seed)
    requests = [coin.randbytes(coin.randint(0, 40)) for _ in range(count)]
    requests += [changed(coin) for _ in range(count)]
    house = House()
    reasons: dict[str, int] = {}
    async with house.open(), grpc.aio.insecure_channel(house.address) as channel:
        call = bytes_stream(channel, METHOD)
        assert await answer_to(call, GOOD) is None
        for request in requests:
            error = await answer_to(call, request)
            reason = "served" if error is None else error.reason
            assert reason == "served" or CODES[reason].name in {
                "INVALID_ARGUMENT",
                "FAILED_PRECONDITION",
            }, (reason, request)
            reasons[reason] = reasons.get(reason, 0) + 1
    # The bytes were not all refused for one and the same cause.
    assert len(reasons) > 4
    assert reasons["served"] > count / 50
