"""Where the replicas of a role are, as its setting says it.

`host:port` is looked up in the DNS, where a headless service has an address per replica; `a:1,b:2`
names several; `file:///path` is a file with one host:port per line.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from arbitrage.core.shown import shown
from arbitrage.host_port import is_host_and_port, is_ip

FORMS: Final = "host:port with a port from 1 to 65535, several of them as a:1,b:1, or file:///path"
_FILE: Final = "file://"


def malformed_part(address: str) -> str | None:
    """Returns what of an address is none; None where all of it is well formed.

    >>> malformed_part("target.svc:50052,[::1]:50052"), malformed_part("file:///etc/replicas")
    (None, None)
    >>> malformed_part("a:1,b:99999"), malformed_part("http://a:1")
    ('b:99999', 'http://a:1')
    """
    if address.startswith(_FILE):
        return None if address.startswith(f"{_FILE}/") else address
    return next((part for part in address.split(",") if not is_host_and_port(part)), None)


async def listed(address: str) -> tuple[str, ...]:
    """Returns each host:port that an address names.

    Raises:
        OSError: its file cannot be read.
    """
    if not address.startswith(_FILE):
        return tuple(address.split(","))
    path = Path(address.removeprefix(_FILE))
    text = await asyncio.to_thread(path.read_text, "utf-8", "replace")
    return tuple(text.replace(",", " ").split())


async def looked_up(part: str) -> Mapping[str, str]:
    """Returns the addresses behind a host:port, each with the name it was found under.

    Raises:
        OSError: it is none, or the DNS does not know it.
    """
    if not is_host_and_port(part):
        raise OSError(f"expected host:port with a port from 1 to 65535, got {shown(part)}")
    host, _, port = part.rpartition(":")
    if is_ip(host.strip("[]")):
        return {part: ""}
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # A host with addresses of both kinds is one replica, not two.
    kinds = {info[0] for info in infos}
    kind = socket.AF_INET if socket.AF_INET in kinds else socket.AF_INET6
    found = {}
    for family, _, _, _, location in infos:
        if family == kind:
            ip, number = socket.getnameinfo(location, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
            found[f"[{ip}]:{number}" if ":" in ip else f"{ip}:{number}"] = host
    return found
