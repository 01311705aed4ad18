"""Wires between programs, for tests that let what is at the other end vanish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Wire:
    """A port that leads to another one until it is cut.

    A cut wire is not closed: what is sent over it is lost, as on the way to a host without power.
    """

    def __init__(self, port: int) -> None:
        self.address = ""
        self._port = port
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        self._is_over = False
        self._ends: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        """Lets nothing through any more."""
        self._is_whole.clear()

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Wire]:
        """Takes connections until the block is left."""
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self._is_over = True
            self._is_whole.set()
            # A connection that was taken just now has a few turns of the loop to begin.
            for _ in range(10):
                await asyncio.sleep(0)
            for end in self._ends:
                end.transport.abort()
            await asyncio.gather(*self._connections)

    async def _connect(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        self._ends.add(near_out)
        try:
            far_in, far_out = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            near_out.transport.abort()
            return
        self._ends.add(far_out)
        if self._is_over:
            near_out.transport.abort()
            far_out.transport.abort()
        await asyncio.gather(self._carry(near_in, far_out), self._carry(far_in, near_out))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while sent := await source.read(1 << 16):
                await self._is_whole.wait()
                sink.write(sent)
                await sink.drain()
        except ConnectionError:
            pass
        sink.close()
