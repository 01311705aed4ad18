"""Wires between programs, for tests that let what is at the other end vanish."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress


class Wire:
    """A port that leads to another one until it is cut.

    A cut wire is not closed: what is sent over it is lost, as on the way to a host without power.
    """

    def __init__(self, port: int) -> None:
        self.address = ""
        self._port = port
        self._is_whole = asyncio.Event()
        self._is_whole.set()

    def cut(self) -> None:
        """Lets nothing through any more."""
        self._is_whole.clear()

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Wire]:
        """Takes connections until the block is left."""
        loop = asyncio.get_running_loop()
        connections: set[asyncio.Task[None]] = set()
        # Sockets of ours, not asyncio's streams: those open and close some turns of the loop later
        # than they say, and the loop may have ended by then.
        with ExitStack() as sockets, socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"

            def take() -> None:
                # Who has left already is nobody to connect.
                with suppress(BlockingIOError, ConnectionError):
                    near = sockets.enter_context(listener.accept()[0])
                    far = sockets.enter_context(socket.socket())
                    connections.add(loop.create_task(self._connect(near, far)))

            loop.add_reader(listener, take)
            try:
                yield self
            finally:
                loop.remove_reader(listener)
                for connection in connections:
                    connection.cancel()
                await asyncio.gather(*connections, return_exceptions=True)

    async def _connect(self, near: socket.socket, far: socket.socket) -> None:
        near.setblocking(False)
        far.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(far, ("127.0.0.1", self._port))
        except OSError:
            _hang_up(near)
            return
        await asyncio.gather(self._carry(near, far), self._carry(far, near))

    async def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError):
            while sent := await loop.sock_recv(source, 1 << 16):
                await self._is_whole.wait()
                await loop.sock_sendall(sink, sent)
        _hang_up(sink)


def _hang_up(end: socket.socket) -> None:
    # Not closed: the other direction may still be reading here, and is woken by this.
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
