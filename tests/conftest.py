"""What holds for every test: a blocked event loop is a failure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture(autouse=True)
def a_blocked_event_loop_is_an_error() -> Iterator[BlockBuster]:
    """Raises where a test, or the code under it, blocks the loop it runs on."""
    with blockbuster_ctx(["arbitrage", "services"]) as guard:
        yield guard
