"""What holds for every test: a blocked event loop is a failure."""

from __future__ import annotations

from collections.abc import Iterator

import grpc.aio
import pytest
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture(autouse=True, scope="session")
def grpc_stays_loaded() -> None:
    """Keeps gRPC's poller thread alive from test to test.

    Otherwise grpc.aio joins it whenever the last channel is collected, on whatever loop is running
    then, and a blocked loop fails the test.
    """
    grpc.aio.init_grpc_aio()  # type: ignore[attr-defined]  # missing in grpc-stubs


@pytest.fixture(autouse=True)
def a_blocked_event_loop_is_an_error() -> Iterator[BlockBuster]:
    """Raises where a test, or the code under it, blocks the loop it runs on."""
    with blockbuster_ctx(["arbitrage", "services"]) as guard:
        yield guard
