"""A small HTTP server on a free port, for tests of clients: it does what a handler says.

It speaks HTTP/1.1 over a real socket, so what is broken on purpose is broken as a network breaks
it: half a chunk, half a character, silence, a connection that closes.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class HttpRequest:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


@dataclass
class HttpReply:
    """What goes back. `is_gone` is set when the client has closed the connection."""

    _writer: asyncio.StreamWriter
    is_gone: asyncio.Event = field(default_factory=asyncio.Event)
    is_begun: bool = False

    async def answer(self, status: int, body: object, **headers: str) -> None:
        """Sends a whole answer: text as it is, anything else as JSON."""
        text = body if isinstance(body, str) else json.dumps(body)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        await self.begin(status, **{"Content-Type": "application/json", **given})
        await self.send(text.encode())
        await self.end()

    async def begin(self, status: int = 200, **headers: str) -> None:
        """Sends the head of an answer in chunks; server-sent events unless `headers` say else."""
        self.is_begun = True
        all_headers = {"Content-Type": "text/event-stream", **headers}
        lines = [f"HTTP/1.1 {status} As Told", "Transfer-Encoding: chunked"]
        lines += [f"{name}: {value}" for name, value in all_headers.items()]
        self._writer.write("\r\n".join([*lines, "", ""]).encode())
        await self._writer.drain()

    async def event(self, data: object) -> None:
        """Sends a server-sent event: text as it is, anything else as JSON."""
        text = data if isinstance(data, str) else json.dumps(data)
        await self.send(f"data: {text}\n\n".encode())

    async def send(self, content: bytes) -> None:
        """Sends bytes as one chunk."""
        self._writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        await self._writer.drain()

    async def end(self) -> None:
        """Ends the answer as one should."""
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    async def break_off(self) -> None:
        """Closes the connection in the middle."""
        self._writer.close()


Handler = Callable[[HttpRequest, HttpReply], Awaitable[None]]


@dataclass
class HttpTestServer:
    """A server that is running; `requests` are all that came, `gone_count` who left early.

    `connection_count` is how many connections were opened.
    """

    url: str
    requests: list[HttpRequest] = field(default_factory=list)
    gone_count: int = 0
    connection_count: int = 0


@asynccontextmanager
async def http_server(
    handler: Handler, tls: ssl.SSLContext | None = None
) -> AsyncIterator[HttpTestServer]:
    """Serves with `handler` until the block is left."""
    running = HttpTestServer("")
    connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                await _serve_one(running, handler, reader, writer)
        writer.close()

    # No coroutine: a task of asyncio's that is cancelled before its first turn closes nothing.
    def taken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.connection_count += 1
        connections[asyncio.ensure_future(serve(reader, writer))] = writer

    server = await asyncio.start_server(taken, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    running.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{port}"
    try:
        yield running
    finally:
        server.close()
        for task, writer in connections.items():
            task.cancel()
            writer.transport.abort()
        await asyncio.gather(*connections, return_exceptions=True)


async def _serve_one(
    running: HttpTestServer,
    handler: Handler,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    request = await _read(reader)
    running.requests.append(request)
    reply = HttpReply(writer)
    # No client sends its next request before this answer: what can be read is that it has left.
    watch = asyncio.ensure_future(reader.read(1))
    watch.add_done_callback(lambda _: reply.is_gone.set())
    work = asyncio.ensure_future(handler(request, reply))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            running.gone_count += 1
            work.cancel()
            raise ConnectionResetError
        work.result()
    finally:
        work.cancel()
        watch.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> HttpRequest:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return HttpRequest(method, path, headers, body)
