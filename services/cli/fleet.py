"""Every service of a deployment as child processes: started together, watched, stopped in order.

No child outlives this process (see `child.py`), and none runs on without the others: the first
that ends is a `ServiceDied`, and leaving `running_fleet` stops the rest.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from arbitrage.core.errors import Unavailable
from services.cli.failures import CommandError
from services.cli.plan import GATEWAY, ORCHESTRATOR, Plan, ServicePlan

_POLL_S = 0.05
_LOG_TAIL_LINES = 15
_LOG_TAIL_BYTES = 64 << 10
_SHARED_SETTINGS = {
    "ARBITRAGE_LOG_FORMAT",
    "ARBITRAGE_LOG_LEVEL",
    "ARBITRAGE_MAX_MESSAGE_MIB",
    "ARBITRAGE_MODEL_FILES",
    "ARBITRAGE_MODEL_PACKS",
    "ARBITRAGE_TRACING_ENDPOINT",
    "ARBITRAGE_TRACING_SAMPLE_RATE",
}
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service that answers."""

    name: str
    address: str
    metrics_port: int
    pid: int


class ServiceDied(CommandError):
    """A service ended while it was needed; the details are the end of its log."""


class Fleet:
    """The processes of one deployment; made by `running_fleet`."""

    def __init__(self, folder: Path, stop_grace_s: float) -> None:
        self.services: dict[str, RunningService] = {}
        self._folder = folder
        self._stop_grace_s = stop_grace_s
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    @property
    def address(self) -> str:
        """Where the orchestrator listens."""
        return self.services[ORCHESTRATOR].address

    def log_path(self, name: str) -> Path:
        """Returns the file that holds what a service wrote."""
        return self._folder / f"{name}.log"

    async def start(
        self, plan: Plan, on_ready: Callable[[RunningService], object], timeout_s: float
    ) -> None:
        """Starts everything and returns once all of it serves.

        Raises:
            ServiceDied: one ended, or did not serve in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                async with asyncio.TaskGroup() as group:
                    for service in plan.first_services():
                        group.create_task(self._start_service(service, on_ready))
                addresses = {name: service.address for name, service in self.services.items()}
                await self._start_service(plan.orchestrator(addresses), on_ready)
                for service in plan.last_services(self.address):
                    await self._start_service(service, on_ready)
        except ExceptionGroup as errors:
            raise _cause_of(errors) from None
        except TimeoutError:
            late = [name for name in self._processes if name not in self.services]
            raise ServiceDied(
                f"{', '.join(late)} did not serve within {timeout_s:g} s",
                await self._log_tail(*late),
            ) from None

    async def watch(self) -> None:
        """Waits until a service ends.

        Raises:
            ServiceDied: always.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for name, process in self._processes.items():
                    group.create_task(self._raise_when_dead(name, process))
        except ExceptionGroup as errors:
            raise _cause_of(errors) from None

    async def stop(self) -> None:
        """Stops everything, who calls before whom they call, so that requests can end with all.

        What has not ended within the grace is killed, and all of it at once where the wait itself
        is cancelled.
        """
        try:
            for names in ((GATEWAY,), (ORCHESTRATOR,), tuple(self._processes)):
                running = [
                    process
                    for name in names
                    if (process := self._processes.get(name)) and process.returncode is None
                ]
                for process in running:
                    process.terminate()
                await self._wait_or_kill(running)
        finally:
            await _kill(self._processes.values())

    async def _wait_or_kill(self, processes: list[asyncio.subprocess.Process]) -> None:
        try:
            async with asyncio.timeout(self._stop_grace_s):
                for process in processes:
                    await process.wait()
        except TimeoutError:
            await _kill(processes)

    async def _start_service(
        self, plan: ServicePlan, on_ready: Callable[[RunningService], object]
    ) -> None:
        ready_file = self._folder / f"{plan.name}.ready.json"
        log = await asyncio.to_thread(self._fresh_log, plan.name, ready_file)
        with log:
            # Started from this thread on purpose: the kernel ties a child's life to the thread
            # that started it, not to the process.
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                # Nothing is imported from the folder that the person happens to stand in.
                "-P",
                "-m",
                "services.cli.child",
                str(os.getpid()),
                plan.module,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_child_environ(plan, ready_file),
                # Ctrl-C at a terminal reaches the whole group; only this process may act on it.
                start_new_session=True,
            )
        self._processes[plan.name] = process
        while (ready := await asyncio.to_thread(_read_if_there, ready_file)) is None:
            for name, other in self._processes.items():
                if other.returncode is not None:
                    raise await self._death(name, other.returncode, "before everything served")
            await asyncio.sleep(_POLL_S)
        told = json.loads(ready)
        service = RunningService(plan.name, told["address"], told["metrics_port"], process.pid)
        self.services[plan.name] = service
        on_ready(service)

    def _fresh_log(self, name: str, ready_file: Path) -> BinaryIO:
        ready_file.unlink(missing_ok=True)
        return self.log_path(name).open("wb")

    async def _raise_when_dead(self, name: str, process: asyncio.subprocess.Process) -> None:
        raise await self._death(name, await process.wait(), "while it was needed")

    async def _death(self, name: str, returncode: int, when: str) -> ServiceDied:
        how = f"exit code {returncode}" if returncode >= 0 else f"signal {-returncode}"
        return ServiceDied(
            f"{name} ended {when} ({how}); its log is {self.log_path(name)}",
            await self._log_tail(name),
        )

    async def _log_tail(self, *names: str) -> tuple[str, ...]:
        def read() -> tuple[str, ...]:
            return tuple(line for name in names for line in _last_lines(self.log_path(name)))

        return await asyncio.to_thread(read)


def _child_environ(plan: ServicePlan, ready_file: Path) -> dict[str, str]:
    """Returns this process's environment with the plan's settings and none that are not for all.

    Services refuse settings they do not know, so one meant for the orchestrator must not reach
    the others.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ARBITRAGE_") or name in _SHARED_SETTINGS
    }
    return {**inherited, **plan.environ, "ARBITRAGE_READY_FILE": str(ready_file)}


async def _kill(processes: Iterable[asyncio.subprocess.Process]) -> None:
    alive = [process for process in processes if process.returncode is None]
    # All of them before the first wait, which may be cancelled.
    for process in alive:
        process.kill()
    for process in alive:
        await process.wait()


def _last_lines(log: Path) -> list[str]:
    """Returns the end of a log; nothing where it cannot be read, which must not hide a death."""
    try:
        with log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _LOG_TAIL_BYTES))
            tail = stream.read(_LOG_TAIL_BYTES)
    except OSError:
        return []
    return tail.decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:]


def _read_if_there(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


@asynccontextmanager
async def running_fleet(
    plan: Plan,
    folder: Path,
    *,
    on_ready: Callable[[RunningService], object] = lambda service: None,
    start_timeout_s: float = 180.0,
    stop_grace_s: float = 5.0,
) -> AsyncIterator[Fleet]:
    """Starts a deployment, hands it over once it serves, and stops it on the way out.

    Logs go to files in `folder`. The start takes a quarter of a minute on two idle cores, most of
    it imports, and a multiple of that on busy ones: hence `start_timeout_s`. `stop_grace_s` is
    what running requests, and after them the models, get for ending.
    """
    fleet = Fleet(folder, stop_grace_s)
    try:
        await fleet.start(plan, on_ready, start_timeout_s)
        yield fleet
    finally:
        await fleet.stop()


async def while_alive(fleet: Fleet, work: Awaitable[_Result]) -> _Result:
    """Returns what `work` comes to, as long as no service of the fleet ends before it.

    Raises:
        ServiceDied: one did; also where `work` noticed it first.
    """
    try:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(fleet.watch())
            try:
                result = await work
            except Unavailable:
                # Most likely a service died and the request saw it before the process was reaped.
                await asyncio.sleep(1.0)
                raise
            watch.cancel()
        return result
    except ExceptionGroup as errors:
        raise _cause_of(errors) from None


def _cause_of(errors: ExceptionGroup) -> Exception:
    """Returns the one error to tell: a death where there is one, since it explains the others."""
    error: Exception = errors.subgroup(ServiceDied) or errors
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
