"""Finds out whether a port can be had, before five programs are started for nothing."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping

from arbitrage.core.shown import shown
from services.cli.failures import BadInput


def check_ports_free(host: str, ports: Mapping[str, int]) -> None:
    """Refuses a port that is taken, asked for twice or not this user's to open. 0 is always free.

    Raises:
        BadInput: names port, option and fix.
    """
    owners: dict[int, str] = {}
    for name, port in ports.items():
        if port == 0:
            continue
        option = f"--{name}-port"
        if port in owners:
            raise BadInput(
                f"{option}: port {port} is also asked for by --{owners[port]}-port; "
                "give each service its own, or use --ports any"
            )
        owners[port] = name
        _check_port_free(host, port, option)


def _check_port_free(host: str, port: int, option: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Ports of connections that are merely winding down count as free, as they do for servers.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                problem = f"port {port} is already taken; stop what listens there"
            elif error.errno == errno.EACCES:
                problem = f"port {port} is not open to this user; choose one above 1023"
            else:
                problem = f"cannot listen on {host} port {port} ({error.strerror}); check --host"
            raise BadInput(f"{option}: {problem}, or use {option} PORT or --ports any") from None
        except (TypeError, ValueError):
            raise BadInput(
                f"--host: {shown(host)} cannot be a host; give an address such as 127.0.0.1"
            ) from None
