"""A Redis that can never serve is refused by its name and version."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter

import pytest

from services.rpc.redis_client import RedisUnusable, opened_client, server_info


async def answer_as_an_old_redis(reader: StreamReader, writer: StreamWriter) -> None:
    """Speaks the protocol as far as a client asks before it has seen the version."""
    info = b"redis_version:6.0.16\r\n"
    while head := await reader.readline():
        words = []
        for _ in range(int(head[1:])):
            size = int((await reader.readline())[1:])
            words.append((await reader.readexactly(size + 2))[:-2].upper())
        match words[0]:
            case b"INFO":
                writer.write(b"$%d\r\n%s\r\n" % (len(info), info))
            case b"HELLO":
                writer.write(b"%1\r\n+proto\r\n:3\r\n")
            case _:
                writer.write(b"+OK\r\n")
    writer.close()


async def test_a_server_that_is_too_old_is_refused_with_its_version() -> None:
    async with await asyncio.start_server(answer_as_an_old_redis, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with opened_client(f"redis://127.0.0.1:{port}", timeout_s=5.0) as client:
            with pytest.raises(RedisUnusable, match=r"Redis 6\.0\.16 is too old; use 6\.2 or"):
                await server_info(client)
