"""Serves an ASGI application on a socket, as a part of a program that does other things too."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from services.rpc.background import in_background


class _Server(uvicorn.Server):
    """Leaves signals to the program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def listening_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound there; port 0 takes a free one.

    Bound here, because uvicorn ends the program where it cannot.

    Raises:
        OSError
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening


@asynccontextmanager
async def served_over_http(
    application: Any,
    listening: socket.socket,
    tls: ssl.SSLContext | None = None,
    grace_s: int | None = None,
) -> AsyncIterator[None]:
    """Serves until the block is left, and closes the socket then.

    Without `tls`, in plaintext. `grace_s` is what running requests get for ending, in seconds; by
    default they are waited for.
    """
    config = uvicorn.Config(
        application,
        log_config=None,
        access_log=False,
        lifespan="off",
        loop="asyncio",
        server_header=False,
        # One parser wherever it runs, not the one that happens to be installed.
        http="h11",
        ws="none",
        timeout_graceful_shutdown=grace_s,
    )
    config.load()
    config.ssl = tls
    server = _Server(config)
    has_ended = asyncio.Event()

    async def serve() -> None:
        try:
            await server.serve(sockets=[listening])
        finally:
            has_ended.set()

    with listening:
        async with in_background(serve()):
            try:
                yield
            finally:
                server.should_exit = True
                await has_ended.wait()
