"""What `up`, `ask` and `demo` share: a verified pack, a run folder, and services with progress."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from services.cli.console import Terminal
from services.cli.failures import BadInput
from services.cli.fleet import Fleet, RunningService, ServiceDied, running_fleet
from services.cli.plan import GENERATOR_ROLES, FleetPlan
from services.engines.pack_manifest import Pack
from services.engines.packs import find_pack, verify_pack

_MEBIBYTE = 1 << 20


def usable_pack(name: str, terminal: Terminal) -> Pack:
    """Returns the pack once every file of it has been found to be what its manifest says.

    Raises:
        UnknownPack, CorruptPack
        BadInput: a file is missing or changed, or a model is not in the pack.
    """
    pack = find_pack(name)
    for role in GENERATOR_ROLES:
        pack.model_reference(role)
    with terminal.progress(f"Verifying {pack.name} (MiB)", pack.size_bytes, _MEBIBYTE) as advance:
        damages = verify_pack(pack, advance)
    if damages:
        fix = f"arbitrage models pull {name}" if pack.is_fetched else "git checkout, for example"
        raise BadInput(
            f"pack {pack.name!r} in {pack.files_folder} is damaged: {damages[0]}; "
            f"restore it with {fix}, then try again",
            tuple(str(damage) for damage in damages[1:]),
        )
    return pack


@contextmanager
def temporary_run_folder() -> Iterator[Path]:
    """Makes a folder for logs; it stays where a service died, for whoever looks for the cause."""
    folder = Path(tempfile.mkdtemp(prefix="arbitrage-"))
    is_evidence = False
    try:
        yield folder
    except ServiceDied:
        is_evidence = True
        raise
    finally:
        if not is_evidence:
            shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def services_with_progress(
    plan: FleetPlan,
    folder: Path,
    terminal: Terminal,
    *,
    start_timeout_s: float = 180.0,
    stop_grace_s: float = 5.0,
) -> AsyncIterator[Fleet]:
    """Starts every service while telling how far it is."""
    started = time.monotonic()
    # With the orchestrator and what needs it, which are planned once the others listen.
    total = len(plan.first_services()) + 1 + len(plan.last_services(""))
    async with AsyncExitStack() as stack:
        with terminal.progress("Starting services", total) as advance:

            def on_ready(service: RunningService) -> None:
                waited_s = time.monotonic() - started
                advance(1, f"{service.name} serves on {service.address} after {waited_s:.1f} s")

            fleet = await stack.enter_async_context(
                running_fleet(
                    plan,
                    folder,
                    on_ready=on_ready,
                    start_timeout_s=start_timeout_s,
                    stop_grace_s=stop_grace_s,
                )
            )
        yield fleet
