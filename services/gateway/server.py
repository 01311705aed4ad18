"""An HTTP server as the program runs one: gate, metrics, errors, streams, drain.

It is to HTTP what `services.rpc.server` and `services.rpc.handlers` are to gRPC.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from arbitrage.channels import is_loopback
from arbitrage.core.errors import ArbitrageError, DeadlineExceeded
from services.gateway.errors import (
    CLIENT_GONE,
    STATUSES,
    HttpError,
    body_of,
    headers_of,
    status_of,
)
from services.gateway.settings import GatewaySettings
from services.rpc.auth import Authenticator
from services.rpc.background import in_background
from services.rpc.gate import FLUSH_GRACE_S, Gate
from services.rpc.handlers import known_error
from services.rpc.http import listening_socket, served_over_http
from services.rpc.server import PortTaken, local_address
from services.rpc.telemetry import SECONDS_BUCKETS, Telemetry
from services.rpc.tls import TlsFiles, server_files
from services.rpc.tracing import ServedCall
from services.rpc.watched import WatchedFiles

_log = logging.getLogger(__name__)
_MIB: Final = 1 << 20
# What stands between clients and servers cuts a stream that is silent for a minute or less.
_LONGEST_SILENCE_S: Final = 15.0
_OTHER: Final = "other"
# By path: HTTP method, and the servicer's method. Every route there is, so that labels are bounded.
ROUTES: Final[Mapping[str, tuple[str, str]]] = {
    "/v1/chat/completions": ("POST", "chat_completions"),
    "/v1/models": ("GET", "models"),
    "/v1/models/{name}": ("GET", "model"),
}


class HttpMetrics:
    """Counts the requests a server answers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "arbitrage_http_requests",
            "HTTP requests answered, by route and status; 499 is a client that left.",
            ("route", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "arbitrage_http_seconds",
            "Time from a request's arrival to the end of its answer.",
            ("route",),
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        for route in (*(name for _, name in ROUTES.values()), _OTHER):
            self._seconds.labels(route)
            for status in STATUSES:
                self._requests.labels(route, str(status))

    def count(self, route: str, status: int, seconds: float) -> None:
        """Counts one request that ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class _Gone(Exception):
    """The client has left."""


class HttpServer:
    """Serves the routes through a servicer that may come later.

    It listens from `start` on, but answers 503 until `open`, and again from `drain` on.
    """

    def __init__(self, settings: GatewaySettings, telemetry: Telemetry) -> None:
        self.gate = Gate()
        self._settings = settings
        self._telemetry = telemetry
        self._metrics = HttpMetrics(telemetry.registry)
        self._servicer: object | None = None
        self._stack = AsyncExitStack()
        self._port = 0

    @property
    def address(self) -> str:
        """Where a program on this machine reaches the server."""
        return local_address(self._settings.host, self._port)

    async def start(self) -> None:
        """Begins to listen, and answers 503.

        Raises:
            PortTaken, TlsError
        """
        settings = self._settings
        context = await self._tls()
        try:
            listening = listening_socket(settings.host, settings.port)
        except OSError as error:
            raise PortTaken(f"{settings.host}:{settings.port}") from error
        self._port = listening.getsockname()[1]
        served = served_over_http(self._application(), listening, context, round(FLUSH_GRACE_S))
        await self._stack.enter_async_context(served)

    async def open(self, servicer: object, authenticator: Authenticator) -> None:
        """Lets requests in. Who may call is the orchestrator's to say, not `authenticator`'s."""
        self._servicer = servicer
        self.gate.open()

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests and lets running ones end; those past the grace are cut off."""
        await self.gate.drain(grace_s)

    async def stop(self) -> None:
        """Stops listening."""
        await self._stack.aclose()

    async def _tls(self) -> ssl.SSLContext | None:
        files = server_files(self._settings)
        if files is None:
            if not is_loopback(f"{self._settings.host}:0"):
                _log.warning(
                    "listening on %s in plaintext: anyone on the way can read requests and keys; "
                    "set ARBITRAGE_TLS_CERTIFICATE and ARBITRAGE_TLS_KEY, or put what ends TLS in "
                    "front",
                    self._settings.host,
                )
            return None
        on_failure = self._telemetry.failed_reloads.of("tls")
        read = partial(_context, files)
        watched = await asyncio.to_thread(WatchedFiles, files.paths, read, on_failure)
        first = watched.value

        def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = watched.value

        # Called at each handshake, with a name or without.
        first.sni_callback = renew
        await self._stack.enter_async_context(in_background(watched.follow()))
        return first

    def _application(self) -> Starlette:
        routes = [
            Route(path, _Endpoint(self, method, name)) for path, (method, name) in ROUTES.items()
        ]
        routes.append(Route("/health", self._health))
        application = Starlette(routes=routes)
        application.router.default = _Endpoint(self, "", _OTHER)
        application.router.redirect_slashes = False
        return application

    async def _health(self, request: Request) -> JSONResponse:
        is_open = self.gate.is_open
        return JSONResponse({"serving": is_open}, 200 if is_open else 503)

    async def answer(
        self, method: str, name: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answers one request of a route, whatever happens."""
        headers = Headers(scope=scope)
        served = ServedCall(name, headers.items())
        reply = _Reply(scope, receive, self._closing(send), self._settings.write_timeout_s)
        started_s = time.monotonic()
        status, reason = CLIENT_GONE, None
        try:
            try:
                async with self.gate.passed():
                    _check_route(scope, method, name)
                    body = await self._body(receive)
                    async with in_background(_raise_when_gone(receive)):
                        parameters = scope.get("path_params", {})
                        answer = await getattr(self._servicer, name)(headers, body, **parameters)
                        if isinstance(answer, AsyncGenerator):
                            await reply.stream(answer)
                        else:
                            await reply.whole(200, answer)
                status = 200
            except _Gone:
                # A request whose answer is out is over for its client too.
                status = 200 if reply.is_sent else CLIENT_GONE
            except Exception as error:  # noqa: BLE001 - the last line of defence; nothing is lost
                known = known_error(name, error)
                status, reason = status_of(known), known.reason
                _log.info("%s ended with %s", name, reason)
                await reply.fail(known)
        finally:
            self._metrics.count(name, status, time.monotonic() - started_s)
            served.end(str(status), reason)

    async def _body(self, receive: Receive) -> bytes:
        seconds = self._settings.write_timeout_s
        try:
            async with asyncio.timeout(seconds):
                return await _read(receive, self._settings.max_message_mib)
        except TimeoutError:
            raise HttpError(
                408,
                "request_timeout",
                f"the body was not there within {seconds:g} s; send it faster, or raise "
                "ARBITRAGE_WRITE_TIMEOUT_S",
            ) from None

    def _closing(self, send: Send) -> Send:
        """Returns what sends, and ends connections that are of no further use.

        Those are a server's that ends, whose clients shall go to another one, and one on which the
        rest of a body may come for ever.
        """

        async def sent(message: Message) -> None:
            is_start = message["type"] == "http.response.start"
            if is_start and (message["status"] == 408 or not self.gate.is_open):
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        return sent


class _Endpoint:
    """A route as an ASGI application."""

    def __init__(self, server: HttpServer, method: str, name: str) -> None:
        self._server = server
        self._method = method
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._server.answer(self._method, self._name, scope, receive, send)


class _Reply:
    """One request's answer, of which the status goes out once."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, write_timeout_s: float) -> None:
        self._scope = scope
        self._receive = receive
        self._send_now = send
        self._write_timeout_s = write_timeout_s
        self._writing = asyncio.Lock()
        self._is_streaming = False
        self._has_spoken = False
        self.is_sent = False

    async def whole(
        self, status: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        """Sends everything at once."""
        self.is_sent = True
        response = JSONResponse(content, status, headers)
        await response(self._scope, self._receive, self._send)

    async def stream(self, chunks: AsyncGenerator[Mapping[str, Any]]) -> None:
        """Sends chunks as server-sent events.

        The status waits for the first, but not long, so that what is refused has one of its own.
        """
        async with in_background(self._keep_alive()), aclosing(chunks):
            async for chunk in chunks:
                await self._event(json.dumps(chunk, ensure_ascii=False))
        await self._event("[DONE]")
        self.is_sent = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: ArbitrageError) -> None:
        """Sends an error: as the answer, or as the last event of a stream that has begun."""
        if self.is_sent:
            return
        if not self._is_streaming:
            await self.whole(status_of(error), body_of(error), headers_of(error))
            return
        await self._event(json.dumps(body_of(error), ensure_ascii=False))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self) -> None:
        """Sends a comment, which clients skip, whenever there was nothing to send for a while."""
        while True:
            self._has_spoken = False
            await asyncio.sleep(_LONGEST_SILENCE_S)
            if not self._has_spoken:
                await self._write(b": at work\n\n")

    async def _event(self, data: str) -> None:
        # What protobuf carries is UTF-8 already.
        await self._write(f"data: {data}\n\n".encode())

    async def _write(self, body: bytes) -> None:
        self._has_spoken = True
        async with self._writing:
            if not self._is_streaming:
                await self._begin()
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _begin(self) -> None:
        self._is_streaming = True
        headers = (
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            # nginx would keep steps back until it has a page of them.
            (b"x-accel-buffering", b"no"),
        )
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send(self, message: Message) -> None:
        patience = asyncio.timeout(self._write_timeout_s)
        try:
            async with patience:
                await self._send_now(message)
        except TimeoutError:
            if not patience.expired():
                raise
            # The request's place is needed by others; a reader that has stopped must not keep it.
            self.is_sent = True
            raise DeadlineExceeded(
                f"the client took nothing for {self._write_timeout_s:g} s; read faster, or raise "
                "ARBITRAGE_WRITE_TIMEOUT_S"
            ) from None


def _check_route(scope: Scope, method: str, name: str) -> None:
    if name == _OTHER:
        raise HttpError(404, "not_found", f"there is no {scope['path']}; see docs/openai.md")
    if scope["method"] != method:
        raise HttpError(
            405, "method_not_allowed", f"{scope['path']} takes {method}, not {scope['method']}"
        )


async def _read(receive: Receive, most_mib: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        if len(body) > most_mib * _MIB:
            raise HttpError(
                413,
                "request_too_large",
                f"the body is larger than {most_mib} MiB; send less, or raise "
                "ARBITRAGE_MAX_MESSAGE_MIB",
            )
        if not message.get("more_body", False):
            return bytes(body)


async def _raise_when_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise _Gone


def _context(files: TlsFiles) -> ssl.SSLContext:
    # What it raises names the variable at fault.
    files.read()
    assert files.certificate is not None, "a server has both"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.certificate, files.key)
    if files.ca is not None:
        context.load_verify_locations(files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
