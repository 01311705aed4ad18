"""Does a new target replica get work at once, and does one that leaves lose any?

`python -m tests.load.scale --json FILE`: under steady load a fourth target joins three and leaves
by SIGTERM, several times, each time at another address. Which problems fall to an address is a
matter of chance, and ten seconds see some sixty problems: one join alone tells little.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arbitrage.client import AsyncArbitrageClient, TargetOnly
from arbitrage.core.errors import ArbitrageError
from benchmarks.results import Bar, Claim, Result, bootstrap
from services.cli.problems import bundled_problems
from services.engines.packs import find_pack
from tests.load.processes import Deployment, deployed
from tests.services.redis_servers import free_port

_AT_ONCE = 12
_WINDOW_S = 10.0
_STANDING = ("target-0", "target-1", "target-2")
_NEW = "target-3"
_STEPS = 'arbitrage_rpc_requests_total{method="GenerateStep",code="OK"}'


class Load:
    """Keeps solving problems until it is told to stop."""

    def __init__(self, deployment: Deployment, problems: list[str]) -> None:
        self.solved_count = 0
        self.errors: list[str] = []
        self.is_over = False
        self._deployment = deployment
        self._problems = problems

    async def work(self, number: int) -> None:
        """Solves one problem after the other."""
        async with AsyncArbitrageClient(self._deployment.addresses) as client:
            while not self.is_over:
                problem = self._problems[(self.solved_count + number) % len(self._problems)]
                try:
                    await client.solve(problem, policy=TargetOnly())
                except ArbitrageError as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                self.solved_count += 1


async def steps_of(deployment: Deployment) -> dict[str, float]:
    """Returns the steps that each target has written since it started."""
    return {s.name: await s.metric(_STEPS) for s in deployment.named("target")}


@dataclass(frozen=True, slots=True)
class Joined:
    """What a replica did in its first seconds, and how it left."""

    gained: Mapping[str, float]
    first_step_s: float
    exit_code: int

    @property
    def share(self) -> float:
        """Of all steps of the window, those it wrote."""
        return self.gained[_NEW] / sum(self.gained.values())


async def joined(deployment: Deployment) -> Joined:
    """Lets the new replica come and go once, under the load that is on."""
    service = deployment.services[_NEW]
    service.port = free_port()
    service.launch()
    await service.ready()
    before = await steps_of(deployment)
    deployment.write_targets(*_STANDING, _NEW)
    joined_s = time.monotonic()
    while (await steps_of(deployment))[_NEW] <= before[_NEW]:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    first_s = time.monotonic() - joined_s
    await asyncio.sleep(max(0.0, _WINDOW_S - first_s))
    after = await steps_of(deployment)
    # It says that it stops before anybody has taken it off the list.
    code = await service.stop(signal.SIGTERM)
    await asyncio.sleep(3.0)
    deployment.write_targets(*_STANDING)
    await asyncio.sleep(2.0)
    gained = {name: after[name] - before[name] for name in after}
    return Joined(gained, first_s, code)


async def measured(options: argparse.Namespace) -> Result:
    """Runs everything and returns what it came to."""
    problems = [p.text for p in bundled_problems(find_pack("tiny"), 500)]
    settings = {"prefix_cache_mib": "0"}
    with tempfile.TemporaryDirectory(prefix="arbitrage-scale-") as name:
        async with deployed(Path(name), targets=4, settings=settings) as deployment:
            await deployment.services[_NEW].stop(signal.SIGTERM)
            deployment.write_targets(*_STANDING)
            await asyncio.sleep(2.5)
            load = Load(deployment, problems)
            async with asyncio.TaskGroup() as group:
                for number in range(_AT_ONCE):
                    group.create_task(load.work(number))
                await asyncio.sleep(5.0)
                joins = [await joined(deployment) for _ in range(options.joins)]
                load.is_over = True
    own = np.array([join.gained[_NEW] for join in joins])
    of_all = np.array([sum(join.gained.values()) for join in joins])
    share = float(own.sum() / of_all.sum())
    interval = bootstrap(len(joins), lambda at: float(own[at].sum() / of_all[at].sum()), seed=0)
    codes = [join.exit_code for join in joins]
    for error in load.errors:
        print(f"  failed: {error}")
    claims = (
        Claim(
            "share of the target's steps that a replica writes in its first 10 s", share, "",
            f"metrics of the four targets, from the moment it was listed, over {len(joins)} joins",
            int(of_all.sum()), Bar("at least", 0.2), interval,
        ),
        Claim(
            "requests failed while it joined and left by SIGTERM", len(load.errors), "requests",
            "client errors", load.solved_count, Bar("at most", 0),
        ),
        Claim(
            "replicas that left with another exit code than 0", sum(code != 0 for code in codes),
            "replicas", "SIGTERM under load", len(joins), Bar("at most", 0),
        ),
    )  # fmt: skip
    rows: tuple[dict[str, object], ...] = tuple(
        {
            "share": round(join.share, 4),
            "first_step_after_s": round(join.first_step_s, 2),
            "steps_in_window": dict(join.gained),
        }
        for join in joins
    )
    command = " ".join(["python -m tests.load.scale", *sys.argv[1:]])
    return Result("scale", (), claims, rows, command=command)


def main() -> int:
    """Runs the command line; 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--joins", type=int, default=6)
    options = parser.parse_args()
    result = asyncio.run(asyncio.wait_for(measured(options), 60 + 60 * options.joins))
    result.print_claims()
    print(*result.rows, sep="\n")
    if options.json is not None:
        result.write(options.json)
    return 0 if all(claim.as_json()["holds"] for claim in result.claims) else 1


if __name__ == "__main__":
    sys.exit(main())
