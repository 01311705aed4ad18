"""What an address of a server looks like."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

_HOST: Final = re.compile(r"(?=.{1,253}$)[\w-]{1,63}(\.[\w-]{1,63})*\.?", re.ASCII)
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")
_MOST_PORT: Final = 65_535


def is_host_and_port(text: str) -> bool:
    """Whether a text is a host's name or IP address with a port behind it.

    >>> [is_host_and_port(text) for text in ("target.svc:50052", "[::1]:1", "a:99999", "http://a:1")]
    [True, True, False, False]
    """
    host, _, port = text.rpartition(":")
    if not _PORT.fullmatch(port) or int(port) > _MOST_PORT:
        return False
    if host.startswith("[") and host.endswith("]"):
        return ":" in host and is_ip(host[1:-1])
    return _HOST.fullmatch(host) is not None


def is_ip(host: str) -> bool:
    """Whether a text is an IP address, without a port or brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
