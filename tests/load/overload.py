"""What becomes of a deployment that is asked for three times what it can do?

`python -m tests.load.overload --json FILE`: its capacity is measured first, and the latency of a
quiet tenant that is alone. Then another tenant floods it for a minute, open loop, while the quiet
one goes on as before. Loopback only, bounded in count and time.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from arbitrage.client import AsyncArbitrageClient, TargetOnly
from arbitrage.core.errors import ArbitrageError, Overloaded
from benchmarks.results import Bar, Claim, Result
from services.cli.problems import bundled_problems
from services.engines.packs import find_pack
from tests.load.processes import Deployment, deployed

_QUIET_EVERY_S = 0.5
_MAX_CONCURRENCY = 4
_MAX_QUEUE = 16
_SHARE = "0.75"


@dataclass
class Tenant:
    """One tenant's requests, and how they ended."""

    name: str
    key: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    done_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def entry(self) -> str:
        """What the server's file says of it."""
        digest = hashlib.sha256(self.key.encode()).hexdigest()
        return f'[[keys]]\nid = "{self.name}"\ntenant = "{self.name}"\nsha256 = "{digest}"\n'

    async def solve(self, client: AsyncArbitrageClient, problem: str) -> None:
        """Sends one request and keeps how it ended."""
        began_s = time.perf_counter()
        try:
            await client.solve(problem, policy=TargetOnly())
            self.done_s.append(time.perf_counter() - began_s)
        except Overloaded:
            self.refused_s.append(time.perf_counter() - began_s)
        except ArbitrageError as error:
            self.errors.append(f"{type(error).__name__}: {error}")

    def forget(self) -> None:
        """Begins a new phase."""
        self.done_s, self.refused_s, self.errors = [], [], []


class Run:
    """The phases of a run over one deployment."""

    def __init__(self, deployment: Deployment, flood: Tenant, quiet: Tenant) -> None:
        problems = [p.text for p in bundled_problems(find_pack("tiny"), 500)]
        self.deployment = deployment
        self.flood = flood
        self.quiet = quiet
        self.longest_queue = 0.0
        self.memory: dict[str, list[float]] = {}
        self._problems = itertools.cycle(problems)

    async def capacity(self, seconds: float) -> float:
        """Returns solutions a second with every place taken."""
        until_s = time.monotonic() + seconds

        async def work(tenant: Tenant) -> None:
            async with self.client(tenant) as client:
                while time.monotonic() < until_s:
                    await tenant.solve(client, next(self._problems))

        async with asyncio.TaskGroup() as group:
            for tenant in (self.flood, self.quiet):
                for _ in range(_MAX_CONCURRENCY):
                    group.create_task(work(tenant))
        return (len(self.flood.done_s) + len(self.quiet.done_s)) / seconds

    async def paced(self, tenant: Tenant, every_s: float, seconds: float) -> None:
        """Sends requests at a fixed rate, whatever becomes of those before."""
        began_s = time.monotonic()
        async with self.client(tenant) as client, asyncio.TaskGroup() as group:
            for number in range(int(seconds / every_s)):
                await asyncio.sleep(max(0.0, began_s + number * every_s - time.monotonic()))
                group.create_task(tenant.solve(client, next(self._problems)))

    async def watch(self, seconds: float) -> None:
        """Notes queue and memory every second."""
        for _ in range(int(seconds)):
            for service in self.deployment.services.values():
                self.memory.setdefault(service.name, []).append(service.memory_mib())
            orchestrator = self.deployment.named("orchestrator")[0]
            waiting = await orchestrator.metric("arbitrage_solutions_waiting")
            self.longest_queue = max(self.longest_queue, waiting)
            await asyncio.sleep(1.0)

    def client(self, tenant: Tenant) -> AsyncArbitrageClient:
        """Returns a client with the tenant's key."""
        return AsyncArbitrageClient(self.deployment.addresses, retries=0, api_key=tenant.key)


def growth(memory: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns by how much each process grew, from the second sixth of the run to the last."""
    grown = {}
    for name, samples in memory.items():
        sixth = max(1, len(samples) // 6)
        first, last = np.median(samples[sixth : 2 * sixth]), np.median(samples[-sixth:])
        grown[name] = round(float(last / first) - 1.0, 4)
    return grown


async def measured(options: argparse.Namespace) -> Result:
    """Runs everything and returns what it came to."""
    flood, quiet = Tenant("flood"), Tenant("quiet")
    with tempfile.TemporaryDirectory(prefix="arbitrage-overload-") as name:
        keys = Path(name) / "keys.toml"
        keys.write_text(flood.entry + quiet.entry)
        settings = {
            "max_concurrency": str(_MAX_CONCURRENCY),
            "max_queue": str(_MAX_QUEUE),
            "tenant_max_share": _SHARE,
            "prefix_cache_mib": "0",
            "api_keys_file": str(keys),
        }
        async with deployed(
            Path(name),
            targets=1,
            orchestrators=1,
            settings=settings,
            # Full before the flood begins: a cache that fills up to its bound is no leak.
            target_settings={"kv_cache_mib": "64"},
        ) as deployment:
            run = Run(deployment, flood, quiet)
            await run.capacity(5.0)
            flood.forget()
            quiet.forget()
            capacity = await run.capacity(options.seconds / 3)
            flood.forget()
            quiet.forget()
            await run.paced(quiet, _QUIET_EVERY_S, options.seconds / 3)
            alone_p50, alone_p95 = np.percentile(quiet.done_s, [50, 95])
            quiet.forget()
            began_s = time.monotonic()
            async with asyncio.TaskGroup() as group:
                group.create_task(run.watch(options.seconds))
                group.create_task(run.paced(flood, 1 / (3 * capacity), options.seconds))
                group.create_task(run.paced(quiet, _QUIET_EVERY_S, options.seconds))
            took_s = time.monotonic() - began_s
    for error in (*flood.errors, *quiet.errors)[:5]:
        print(f"  failed: {error}")
    goodput = (len(flood.done_s) + len(quiet.done_s)) / took_s / capacity
    quiet_p50, quiet_p95 = np.percentile(quiet.done_s, [50, 95])
    refused_p95 = float(np.percentile(flood.refused_s, 95)) * 1000
    grown = growth(run.memory)
    failed = len(flood.errors) + len(quiet.errors)
    offered = len(flood.done_s) + len(flood.refused_s) + len(quiet.done_s) + len(quiet.refused_s)
    claims = (
        Claim(
            "goodput over capacity at three times the capacity", goodput, "",
            "solutions a second, both tenants", offered, Bar("at least", 0.9),
        ),
        Claim(
            "time of a refusal, p95", refused_p95, "ms", "at the client", len(flood.refused_s),
            Bar("at most", 50),
        ),
        Claim(
            "longest queue", run.longest_queue, "requests", "every second", len(run.memory),
            Bar("at most", _MAX_QUEUE),
        ),
        Claim(
            "largest growth of a process's memory", max(grown.values()), "",
            "resident memory, median of the last sixth over the second", len(grown),
            Bar("at most", 0.05),
        ),
        Claim(
            "p95 of the quiet tenant over that when it is alone", float(quiet_p95 / alone_p95), "×",
            "same rate, same kind of problems", len(quiet.done_s), Bar("at most", 2),
        ),
        Claim(
            "requests of the quiet tenant that were refused", len(quiet.refused_s), "requests",
            "client errors", len(quiet.done_s), Bar("at most", 0),
        ),
        Claim("requests failed", failed, "requests", "errors other than refusals", offered,
            Bar("at most", 0),
        ),
    )  # fmt: skip
    rows: tuple[dict[str, object], ...] = (
        {"capacity_per_s": round(capacity, 2), "offered": offered, "refused": len(flood.refused_s)},
        {
            "refused_ms": np.percentile(np.array(flood.refused_s) * 1000, [50, 90, 95, 99])
            .round()
            .tolist()
        },
        {"quiet_alone_s": [round(float(alone_p50), 3), round(float(alone_p95), 3)]},
        {"quiet_flooded_s": [round(float(quiet_p50), 3), round(float(quiet_p95), 3)]},
        {"memory_growth": grown},
    )
    command = " ".join(["python -m tests.load.overload", *sys.argv[1:]])
    return Result("overload", (), claims, rows, command=command)


def main() -> int:
    """Runs the command line; 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    result = asyncio.run(asyncio.wait_for(measured(options), 400))
    result.print_claims()
    print(*result.rows, sep="\n")
    if options.json is not None:
        result.write(options.json)
    return 0 if all(claim.as_json()["holds"] for claim in result.claims) else 1


if __name__ == "__main__":
    sys.exit(main())
