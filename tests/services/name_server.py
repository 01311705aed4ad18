"""A DNS server that knows one name, so that a test says what it stands for."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

_ADDRESS = 1
_HEADER = struct.Struct("!6H")
# An answer without an error, from a server that would look further.
_ANSWERED = 0x8180


class _Answers(asyncio.DatagramProtocol):
    def __init__(self, hosts: Callable[[], Sequence[str]]) -> None:
        self._hosts = hosts

    def connection_made(self, transport: Any) -> None:
        """Keeps what answers go out by."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answers one question: with the hosts where IPv4 addresses are asked for, else nothing."""
        number, *_ = _HEADER.unpack_from(data)
        end = data.index(b"\0", _HEADER.size) + 5
        question = data[_HEADER.size : end]
        [kind] = struct.unpack("!H", question[-4:-2])
        hosts = self._hosts() if kind == _ADDRESS else ()
        # 0xC00C is the name in the question; a record is forgotten at once.
        records = b"".join(
            struct.pack("!HHHIH", 0xC00C, _ADDRESS, 1, 0, 4) + socket.inet_aton(host)
            for host in hosts
        )
        header = _HEADER.pack(number, _ANSWERED, 1, len(hosts), 0, 0)
        self._transport.sendto(header + question + records, addr)


@asynccontextmanager
async def dns_server(hosts: Callable[[], Sequence[str]]) -> AsyncIterator[str]:
    """Serves until the block is left; yields its host:port. `hosts` says what a name stands for."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Answers(hosts), local_addr=("127.0.0.1", 0)
    )
    host, port = transport.get_extra_info("sockname")
    try:
        yield f"{host}:{port}"
    finally:
        transport.close()
