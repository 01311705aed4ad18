"""`arbitrage up`: every service on this machine until it is told to stop."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from services.cli.console import Terminal
from services.cli.deployment import services_with_progress, usable_pack
from services.cli.failures import BadInput
from services.cli.fleet import Fleet
from services.cli.plan import DEFAULT_PORTS, GATEWAY, FleetPlan
from services.cli.ports import check_ports_free
from services.cli.signals import run_until_signalled

# A request that is running when the stop comes may take this long to end; then it is cut off, and
# the services have the difference to say so before they are killed.
_REQUEST_GRACE_S = 25.0
_STOP_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `up` was asked for. A port of 0 means any free one; `extra` has variables by service."""

    pack: str
    host: str
    ports: Mapping[str, int]
    threads: int
    prefix_cache_mib: int
    run_folder: Path | None
    extra: Mapping[str, Mapping[str, str]]
    redis: str | None = None


def up(options: UpOptions, terminal: Terminal) -> int:
    """Runs until it is told to stop or until a service dies.

    Raises:
        BadInput, PackError, ServiceDied
    """
    check_ports_free(options.host, options.ports)
    pack = usable_pack(options.pack, terminal)
    plan = FleetPlan(
        pack,
        options.ports,
        options.host,
        options.threads,
        options.prefix_cache_mib,
        _REQUEST_GRACE_S,
        options.extra,
        redis=options.redis,
        has_gateway=True,
    )
    work = _serve(plan, _run_folder(options.run_folder), terminal)
    # Being told to stop is how a server ends well.
    return run_until_signalled(work, exit_code_when_terminated=0)


async def _serve(plan: FleetPlan, folder: Path, terminal: Terminal) -> int:
    async with services_with_progress(plan, folder, terminal, stop_grace_s=_STOP_GRACE_S) as fleet:
        terminal.show(_table(fleet))
        terminal.show(f"Logs: {folder}")
        terminal.show(f"OpenAI API: http://{fleet.services[GATEWAY].address}/v1")
        terminal.show(f'Ready. Ask with: arbitrage ask --address {fleet.address} "…"')
        try:
            await fleet.watch()
        except asyncio.CancelledError:
            terminal.note("Stopping; requests that are running may end. Again to stop at once.")
            raise
    return 0


def _run_folder(asked: Path | None) -> Path:
    if asked is None:
        return Path(tempfile.mkdtemp(prefix="arbitrage-"))
    try:
        asked.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--run-folder: cannot make {asked}: {error.strerror}") from None
    return asked


def _table(fleet: Fleet) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("service", "address", "metrics", "pid"):
        table.add_column(heading)
    # In the order of their ports; a pack may have no PRM or router, a second orchestrator no port.
    known = [name for name in DEFAULT_PORTS if name in fleet.services]
    for name in (*known, *(name for name in fleet.services if name not in known)):
        service = fleet.services[name]
        if not service.metrics_port:
            table.add_row(name, service.address, "-", str(service.pid))
            continue
        metrics = f"http://{service.address.rpartition(':')[0]}:{service.metrics_port}/metrics"
        table.add_row(name, service.address, metrics, str(service.pid))
    return table
