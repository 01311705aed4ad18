"""Runs a service as a program: settings, logging, signals, ready file, exit code.

Exit codes: 0 after a clean stop, 2 where the program cannot start as it was told to, 1 on a
defect. A second signal ends the program at once.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol

from services.rpc.api_keys import KeysError
from services.rpc.auth import AllowedCallers, Anyone, Authenticator
from services.rpc.core_log import core_log
from services.rpc.gate import Gate
from services.rpc.logs import set_up_logging
from services.rpc.server import PortTaken
from services.rpc.settings import (
    ServerSettings,
    SettingsError,
    SettingsT,
    read_settings,
    variable_of,
)
from services.rpc.telemetry import MetricsEndpoint, Telemetry
from services.rpc.tls import TlsError

_log = logging.getLogger("arbitrage")
# What a port that cannot be had says; anything else speaks of the host.
_PORTS_FAULT = frozenset({errno.EADDRINUSE, errno.EACCES})


class StartError(Exception):
    """The program cannot start as it was told to. The message says why and how to mend it."""


class Server(Protocol):
    """What a program serves with: gRPC, or HTTP."""

    @property
    def gate(self) -> Gate:
        """Says whether calls may come in."""
        ...

    @property
    def address(self) -> str:
        """Where a program on this machine reaches the server."""
        ...

    async def start(self) -> None:
        """Begins to listen, and refuses calls.

        Raises:
            PortTaken, TlsError
        """
        ...

    async def open(self, servicer: object, authenticator: Authenticator) -> None:
        """Lets calls in, which `servicer` answers."""
        ...

    async def drain(self, grace_s: float) -> None:
        """Refuses new calls and lets running ones end; cuts them off after the grace."""
        ...

    async def stop(self) -> None:
        """Stops listening."""
        ...


@dataclass(frozen=True, slots=True)
class Program(Generic[SettingsT]):
    """One service program.

    `server` makes what it serves with. `build` makes the servicer, ready to answer, and takes down
    what it made when it is left. `authenticator` says who may call at all; it may read files.
    """

    component: str
    server: Callable[[SettingsT, Telemetry], Server]
    settings: type[SettingsT]
    build: Callable[[SettingsT, Telemetry], AbstractAsyncContextManager[object]]
    authenticator: Callable[[SettingsT, Telemetry], Authenticator] = lambda *_: Anyone()


def main(program: Program[SettingsT]) -> int:
    """Runs `program` until it is told to stop, and returns its exit code."""
    try:
        settings = read_settings(program.settings, os.environ)
    except SettingsError as error:
        for problem in error.problems:
            _complain(program.component, problem)
        return 2
    telemetry = Telemetry()
    component = settings.deployment or program.component
    is_tls = settings.tls_certificate is not None
    # First of all, for it gives `sys.stderr` another file.
    with core_log(telemetry.refusals.count_handshake) if is_tls else nullcontext():
        set_up_logging(settings.log_format, settings.log_level, component)
        try:
            with _traced(settings, component):
                asyncio.run(_run(program, settings, telemetry))
        except StartError as error:
            _log.error("%s", error)
            return 2
        except Exception:  # noqa: BLE001 - a trace in the log's format, and the code of a defect
            _log.exception("%s ended with a defect", component)
            return 1
    return 0


def _traced(settings: ServerSettings, component: str) -> AbstractContextManager[None]:
    """Returns what sends traces while it is held, where the settings say where to.

    Raises:
        StartError: OpenTelemetry is not installed.
    """
    if settings.tracing_endpoint is None:
        return nullcontext()
    try:
        from services.rpc.otlp import traces_sent
    except ImportError as error:
        raise StartError(
            f"{variable_of('tracing_endpoint')}: is set, but OpenTelemetry is not installed "
            f"({error}); install 'arbitrage[tracing]', or do not set it"
        ) from error
    return traces_sent(settings.tracing_endpoint, settings.tracing_sample_rate, component)


async def _run(program: Program[SettingsT], settings: SettingsT, telemetry: Telemetry) -> None:
    await _Run(program, settings, telemetry).run()


def _complain(component: str, problem: str) -> None:
    sys.stderr.write(f"{component}: {problem}\n")


class _Run(Generic[SettingsT]):
    """One run of a program, from its ports to its last call."""

    def __init__(
        self, program: Program[SettingsT], settings: SettingsT, telemetry: Telemetry
    ) -> None:
        self._program = program
        self._settings = settings
        self._telemetry = telemetry
        self._stopping = asyncio.Event()
        self._start_error: StartError | None = None
        self._server = program.server(settings, telemetry)

    async def run(self) -> None:
        """Serves until a signal comes, then lets running calls end.

        Raises:
            StartError
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        metrics = self._listen_for_metrics()
        try:
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(self._serve(metrics.port))
                # However it ends: a group says nothing of a task that was cancelled from within.
                serving.add_done_callback(lambda _: self._stopping.set())
                await self._stopping.wait()
                if not self._server.gate.is_open:
                    # Still loading its model or waiting for others: there is nothing to end.
                    serving.cancel()
        finally:
            await asyncio.to_thread(metrics.close)
        if self._start_error is not None:
            raise self._start_error
        _log.info("%s stopped", self._program.component)

    def _stop(self, number: int) -> None:
        if self._stopping.is_set():
            os._exit(128 + number)
        _log.info("signal %s: stopping", signal.Signals(number).name)
        self._stopping.set()

    def _listen_for_metrics(self) -> MetricsEndpoint:
        settings = self._settings
        try:
            return MetricsEndpoint.start(
                self._telemetry,
                settings.host,
                settings.metrics_port,
                is_ready=lambda: self._server.gate.is_open,
            )
        except OSError as error:
            if error.errno not in _PORTS_FAULT:
                raise StartError(
                    f"{variable_of('host')}: {settings.host}: nobody can listen there "
                    f"({error.strerror}); give an address of this machine, 0.0.0.0 for all of them"
                ) from error
            raise _port_taken("metrics_port", settings.host, settings.metrics_port) from error

    async def _serve(self, metrics_port: int) -> None:
        settings, server = self._settings, self._server
        try:
            try:
                await server.start()
            except PortTaken as error:
                raise _port_taken("port", settings.host, settings.port) from error
            authenticator = await asyncio.to_thread(self._authenticator)
            async with self._program.build(settings, self._telemetry) as servicer:
                await server.open(servicer, authenticator)
                await self._announce(metrics_port)
                await self._stopping.wait()
                await server.drain(settings.shutdown_grace_s)
        except (TlsError, KeysError, StartError) as error:
            self._start_error = StartError(str(error))
            self._stopping.set()
        finally:
            await server.stop()

    def _authenticator(self) -> Authenticator:
        inner = self._program.authenticator(self._settings, self._telemetry)
        names = self._settings.allowed_callers
        return AllowedCallers(names, inner) if names else inner

    async def _announce(self, metrics_port: int) -> None:
        address = self._server.address
        _log.info("serving %s on %s (metrics %d)", self._program.component, address, metrics_port)
        if self._settings.ready_file is not None:
            ready = {"address": address, "metrics_port": metrics_port, "pid": os.getpid()}
            path = self._settings.ready_file
            try:
                await asyncio.to_thread(_write_at_once, path, json.dumps(ready))
            except OSError as error:
                raise StartError(
                    f"{variable_of('ready_file')}: {path}: cannot be written ({error.strerror}); "
                    "give a file in a folder that exists and may be written to"
                ) from error


def _port_taken(field: str, host: str, port: int) -> StartError:
    return StartError(
        f"{variable_of(field)}: cannot listen on {host}:{port}, most likely because another "
        f"program does; stop it, or set {variable_of(field)} to a free port (0 takes any)"
    )


def _write_at_once(path: Path, text: str) -> None:
    # Whoever waits for the file must never read half of it.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
