"""Speaks HTTP with a server that runs a model: connections, key, TLS, time, and what went wrong.

It knows no dialect: JSON goes in, and JSON or a stream of events comes out. Whatever can go wrong
on the way ends as one of three errors:

ServerError
├── ServerUnavailable    not reached, silent, a status that says it failed, or no sense
│   ├── ConnectionBroken     the connection failed or ended early; the same call may succeed at once
│   └── KeyRefused           401 or 403
├── ServerOverloaded     429: come back after `retry_after_s`
└── ServerRefused        another 4xx: the server will not do this, however often it is asked
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from arbitrage.core.errors import ArbitrageError, Internal, ModelUnavailable, Overloaded
from arbitrage.core.shown import one_line
from arbitrage.pem import PemError, read_pem
from services.engines.engine_transport import LentTransport, Utf8Transport

_CONNECT_TIMEOUT_S = 5.0
_LONGEST_SAID = 400  # characters of a server's own words that an error repeats
_LONGEST_RETRY_S = 600.0
_END_PATIENCE_S = 0.25
_REFUSALS = frozenset({400, 405, 409, 410, 413, 414, 415, 422})
_LAST_EVENT = "[DONE]"


class EngineSetupError(Exception):
    """A server cannot be used as told; `setting` is the field to mend, the message says how."""

    def __init__(self, setting: str, problem: str, fix: str) -> None:
        self.setting = setting
        super().__init__(f"{problem}; {fix}")


class ServerError(Exception):
    """A call of a model's server failed; `status` is what it answered, where it did."""

    status: int | None = None

    @property
    def kind(self) -> str:
        """What happened, for logs: without the server's words, which may quote a prompt or a text.

        >>> ServerError("http://a: answered 500: cannot do 'Ann owns 14.'").kind
        'ServerError'
        """
        status = "" if self.status is None else f", status {self.status}"
        cause = "" if self.__cause__ is None else f", {type(self.__cause__).__name__}"
        return f"{type(self).__name__}{status}{cause}"

    def as_core(self, unavailable: type[ModelUnavailable]) -> ArbitrageError:
        """Returns what it means to a caller of our own service."""
        return unavailable(str(self))


class ServerUnavailable(ServerError):
    """The server gave no answer that can be used; another one may."""


class ConnectionBroken(ServerUnavailable):
    """The connection failed, or the answer ended in the middle."""


class KeyRefused(ServerUnavailable):
    """The server does not know the API key, or wants one."""


class ServerOverloaded(ServerError):
    """The server takes no more now."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def as_core(self, unavailable: type[ModelUnavailable]) -> ArbitrageError:
        """Returns the error that says when to come back."""
        return Overloaded(str(self), self.retry_after_s)


class ServerRefused(ServerError):
    """The server will not do what it was asked; `said` is the reason in its own words."""

    def __init__(self, message: str, said: str) -> None:
        self.said = said
        super().__init__(message)

    def as_core(self, unavailable: type[ModelUnavailable]) -> ArbitrageError:
        """Returns a defect: what is sent is made here, so no caller can mend it."""
        return Internal(str(self))


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How a server is reached.

    `url` is what stands before the paths of its API; `ca` a PEM file with the authorities that are
    believed instead of the system's. A server that sends nothing for `silence_timeout_s` is given
    up, and at most `max_connections` are open.
    """

    url: str
    api_key: str | None = None
    ca: Path | None = None
    silence_timeout_s: float = 60.0
    max_connections: int = 128


class HttpServer:
    """One server of a model, over a pool of connections.

    Making one reads the CA's file, so a coroutine does it in a thread.

    Raises:
        EngineSetupError: the CA cannot be used.
    """

    def __init__(self, options: HttpOptions) -> None:
        self.url = options.url.rstrip("/")
        self._silence_timeout_s = options.silence_timeout_s
        limits = httpx2.Limits(
            max_connections=options.max_connections,
            max_keepalive_connections=options.max_connections,
        )
        self._transport = Utf8Transport(
            httpx2.AsyncHTTPTransport(verify=_ssl_context(options), trust_env=False, limits=limits)
        )
        self._api_key = options.api_key
        self._client = self.lent_client()

    def lent_client(self) -> httpx2.AsyncClient:
        """Returns a client of this server's connections; closing it leaves them open."""
        timeout = httpx2.Timeout(self._silence_timeout_s, connect=_CONNECT_TIMEOUT_S)
        return httpx2.AsyncClient(
            transport=LentTransport(self._transport, self._api_key, timeout),
            # Compressed text would be held back until a block of it is full, and checked too late.
            headers={"Accept-Encoding": "identity"},
            trust_env=False,
            # Whoever makes an error of a status has the server's own words at hand, then.
            event_hooks={"response": [_read_refusal]},
        )

    async def get(self, path: str) -> Any:
        """Returns the JSON at `path`.

        Raises:
            ServerError
        """
        return await self._answer("GET", path)

    async def post(self, path: str, body: object) -> Any:
        """Returns the JSON that answers `body`.

        Raises:
            ServerError
        """
        return await self._answer("POST", path, body)

    async def events(self, path: str, body: object) -> AsyncGenerator[str]:
        """Yields what each server-sent event that answers `body` carries, up to the last.

        Closing the iterator before that closes the connection, which is how a server hears of it.

        Raises:
            ServerError: also where the stream ends without the event that says it is over.
        """
        with self.failures():
            # The stack is left before `failures`, so that what closing raises is named, too.
            async with AsyncExitStack() as stack:
                source = await stack.enter_async_context(
                    self._client.sse(self.url + path, method="POST", json=body)
                )
                await self.check(source.response)
                events = aiter(source)
                async for event in events:
                    if event.data == _LAST_EVENT:
                        await read_out(events)
                        return
                    yield event.data
        raise ConnectionBroken(f"{self.url}: the stream ended before its last event")

    def parsed(self, text: str | bytes) -> Any:
        """Returns the JSON in `text`.

        Raises:
            ServerUnavailable: it is none.
        """
        try:
            return json.loads(text)
        except ValueError as error:
            shown = text if isinstance(text, str) else text.decode("utf-8", "replace")
            raise ServerUnavailable(
                f"{self.url}: sent what is not JSON: {one_line(shown, 100)!r}"
            ) from error

    async def check(self, response: httpx2.Response) -> None:
        """Raises what the status of a response stands for, unless that is success.

        Raises:
            ServerError
        """
        if not response.is_success:
            raise self.refusal(response, await response.aread())

    def refusal(self, response: httpx2.Response, body: bytes) -> ServerError:
        """Returns the error that a response's status stands for."""
        error = self._refusal(response, body)
        error.status = response.status_code
        return error

    def _refusal(self, response: httpx2.Response, body: bytes) -> ServerError:
        status = response.status_code
        words = _said(body)
        said = f"{self.url}: answered {status}: {words}"
        if status == httpx2.codes.TOO_MANY_REQUESTS:
            return ServerOverloaded(said, _retry_after_s(response))
        if status in {401, 403}:
            return KeyRefused(f"{said}; give it an API key that it knows")
        return ServerRefused(said, words) if status in _REFUSALS else ServerUnavailable(said)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turns what the HTTP client raises into a `ServerError`."""
        try:
            yield
        except httpx2.ConnectTimeout as error:
            raise ConnectionBroken(
                f"{self.url}: nobody took the connection within {_CONNECT_TIMEOUT_S:g} s"
            ) from error
        except httpx2.PoolTimeout as error:
            raise ServerOverloaded(f"{self.url}: every connection is in use") from error
        except httpx2.TimeoutException as error:
            raise ServerUnavailable(
                f"{self.url}: was silent for {self._silence_timeout_s:g} s"
            ) from error
        except UnicodeDecodeError as error:
            raise ServerUnavailable(f"{self.url}: sent bytes that are not UTF-8") from error
        except (httpx2.NetworkError, httpx2.ProtocolError) as error:
            raise ConnectionBroken(f"{self.url}: {_words(error)}") from error
        except httpx2.HTTPError as error:
            raise ServerUnavailable(f"{self.url}: {_words(error)}") from error

    async def close(self) -> None:
        """Closes every connection."""
        await self._client.aclose()
        await self._transport.aclose()

    async def _answer(self, method: str, path: str, body: object = None) -> Any:
        with self.failures():
            async with self._client.stream(method, self.url + path, json=body) as response:
                await self.check(response)
                return self.parsed(await response.aread())


async def read_out(rest: AsyncIterable[object]) -> None:
    """Reads on to the end of an answer that is whole, so that its connection serves the next call.

    Nothing that happens on the way matters any more, and the end is not waited for long.
    """
    with suppress(Exception):
        async with asyncio.timeout(_END_PATIENCE_S):
            async for _ in rest:
                pass


def read_key(path: Path) -> str:
    """Returns the API key in a file.

    Raises:
        EngineSetupError: there is none that a header can carry.
    """
    fix = "give a file that holds the server's API key and nothing else"
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        problem = f"{path} cannot be read ({one_line(str(error), 200)})"
        raise EngineSetupError("engine_api_key_file", problem, fix) from error
    if not key or not key.isprintable() or " " in key:
        raise EngineSetupError("engine_api_key_file", f"{path} holds no key", fix)
    return key


async def _read_refusal(response: httpx2.Response) -> None:
    if response.is_error:
        await response.aread()


def _ssl_context(options: HttpOptions) -> ssl.SSLContext | bool:
    is_plain = options.url.startswith("http:")
    if options.ca is None:
        # Nobody is believed where nobody shows a certificate; reading the system's list takes time.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if is_plain else True
    if is_plain:
        raise EngineSetupError(
            "engine_ca", f"{options.url} shows no certificate", "name it with https://, or no CA"
        )
    try:
        authorities = read_pem(options.ca, None, None).ca
    except PemError as error:
        raise EngineSetupError("engine_ca", f"{error.path}: {error.problem}", error.fix) from error
    assert authorities is not None, "it was asked for"
    return ssl.create_default_context(cadata=authorities.decode())


def _said(body: bytes) -> str:
    """Returns a server's own words, from wherever its kind of server puts them."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    while isinstance(found, dict):
        known = [found[key] for key in ("error", "message", "detail") if found.get(key)]
        if not known:
            break
        found = known[0]
    return one_line(found if isinstance(found, str) else text, _LONGEST_SAID) or "nothing more"


def _words(error: Exception) -> str:
    said = one_line(str(error), _LONGEST_SAID)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _retry_after_s(response: httpx2.Response) -> float:
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return 1.0  # a date, or nothing
    return min(max(seconds, 0.0), _LONGEST_RETRY_S) if seconds == seconds else 1.0
