"""Connections to a model's server, below any client: what must hold whichever client sends."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import AsyncIterator

import httpx2


class _Utf8Stream(httpx2.AsyncByteStream):
    """Passes bytes on as long as they are UTF-8. The client itself would put U+FFFD and go on."""

    def __init__(self, inner: httpx2.AsyncByteStream) -> None:
        self._inner = inner

    async def __aiter__(self) -> AsyncIterator[bytes]:
        decoder = getincrementaldecoder("utf-8")()
        async for part in self._inner:
            decoder.decode(part)
            yield part
        decoder.decode(b"", final=True)

    async def aclose(self) -> None:
        await self._inner.aclose()


class Utf8Transport(httpx2.AsyncBaseTransport):
    """Sends requests, and checks that answers are text."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Utf8Stream(response.stream)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class LentTransport(httpx2.AsyncBaseTransport):
    """A transport that stays open when the client that has it is closed.

    It shows the server's key, and no other that a client may have found on this machine; and it
    waits as long as the server is given, whatever a client is used to.
    """

    def __init__(
        self, inner: httpx2.AsyncBaseTransport, api_key: str | None, timeout: httpx2.Timeout
    ) -> None:
        self._inner = inner
        self._api_key = api_key
        self._timeout = timeout

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.headers.pop("Authorization", None)
        if self._api_key is not None:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        request.extensions = {**request.extensions, "timeout": self._timeout.as_dict()}
        return await self._inner.handle_async_request(request)
