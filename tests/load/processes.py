"""Real service processes on fixed loopback ports, so that one can be killed and come back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import psutil

from tests.services.redis_servers import RedisServer, free_port

ROOT = Path(__file__).resolve().parents[2]
_START_TIMEOUT_S = 180.0


@dataclass
class Service:
    """One program at a fixed port."""

    name: str
    module: str
    environ: Mapping[str, str]
    folder: Path
    port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def ready_file(self) -> Path:
        return self.folder / f"{self.name}.ready"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def launch(self) -> None:
        """Starts it without waiting."""
        self.ready_file.unlink(missing_ok=True)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("ARBITRAGE_")}
        environ = {
            **inherited,
            "OMP_NUM_THREADS": "1",
            "ARBITRAGE_PORT": str(self.port),
            "ARBITRAGE_METRICS_PORT": str(self.metrics_port),
            "ARBITRAGE_READY_FILE": str(self.ready_file),
            **self.environ,
        }
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module], cwd=ROOT, env=environ, stderr=log, stdout=log
            )

    async def ready(self) -> None:
        """Waits until it serves."""
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self.ready_file.exists():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                log = (self.folder / f"{self.name}.log").read_text()[-2000:]
                raise RuntimeError(f"{self.name} did not start: {log}")
            await asyncio.sleep(0.05)

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def stop(self, number: int = signal.SIGKILL) -> int:
        """Ends it and returns its exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait)

    async def metric(self, name: str) -> float:
        """Returns the sum of a metric's series."""

        def read() -> float:
            with urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            return sum(
                float(line.rpartition(" ")[2])
                for line in lines
                if line.split("{")[0].split(" ")[0] == name.split("{")[0]
                and all(label in line for label in name.partition("{")[2].rstrip("}").split(","))
            )

        return await asyncio.to_thread(read)

    def memory_mib(self) -> float:
        """Returns its resident memory."""
        assert self.process is not None
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20


@dataclass
class Deployment:
    """The services of a load run by name, and their Redis."""

    redis: RedisServer
    services: dict[str, Service]

    def named(self, prefix: str) -> list[Service]:
        """Returns the services of a kind, in order."""
        return [service for name, service in self.services.items() if name.startswith(prefix)]

    @property
    def addresses(self) -> list[str]:
        """Where the orchestrators listen."""
        return [service.address for service in self.named("orchestrator")]

    def write_targets(self, *names: str) -> None:
        """Says which targets there are."""
        targets = [self.services[name].address for name in names]
        (self.redis.folder / "targets").write_text("\n".join(targets))


@asynccontextmanager
async def deployed(
    folder: Path,
    *,
    targets: int = 3,
    orchestrators: int = 2,
    settings: Mapping[str, str] | None = None,
    target_settings: Mapping[str, str] | None = None,
    alone: Mapping[str, Mapping[str, str]] | None = None,
) -> AsyncIterator[Deployment]:
    """Runs the tiny pack with as many targets and orchestrators, and ends every process.

    `settings` are those of the orchestrators. `alone` are further orchestrators by name, each with
    settings of its own and no Redis.
    """
    # What Redis was told is on the disk before it says so to anybody but the kernel.
    redis = RedisServer(folder, ("--appendonly", "yes", "--appendfsync", "everysec"))
    services: dict[str, Service] = {}

    def add(name: str, module: str, **environ: str) -> Service:
        named = {f"ARBITRAGE_{key.upper()}": value for key, value in environ.items()}
        services[name] = Service(name, module, named, folder)
        return services[name]

    draft = add("draft", "services.generator", model="tiny", role="draft")
    router = add("router", "services.router", model="tiny")
    named = {"draft_address": draft.address, "router_address": router.address}
    for number in range(targets):
        own = {"model": "tiny", "role": "target", **(target_settings or {})}
        add(f"target-{number}", "services.generator", **own)
    for number in range(orchestrators):
        add(
            f"orchestrator-{number}",
            "services.orchestrator",
            **named,
            target_address=f"file://{folder}/targets",
            store_url=redis.url,
            session_lease_s="1",
            resolve_interval_s="1",
            **(settings or {}),
        )
    for name, apart in (alone or {}).items():
        address = f"file://{folder}/targets"
        add(name, "services.orchestrator", **named, target_address=address, **apart)
    deployment = Deployment(redis, services)
    deployment.write_targets(*(name for name in services if name.startswith("target")))
    try:
        await asyncio.to_thread(redis.start)
        for service in services.values():
            service.launch()
        for service in services.values():
            await service.ready()
        yield deployment
    finally:
        for service in services.values():
            await service.stop()
        await asyncio.to_thread(redis.kill)
