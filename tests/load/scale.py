"""Does a new target replica get work at once, and does one that leaves lose any?

`python -m tests.load.scale --json FILE`: under steady load a fourth target joins three, and later
leaves by SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path

from arbitrage.client import AsyncArbitrageClient, TargetOnly
from arbitrage.core.errors import ArbitrageError
from benchmarks.results import Bar, Claim, Result
from services.cli.problems import bundled_problems
from services.engines.packs import find_pack
from tests.load.processes import Deployment, deployed

_AT_ONCE = 12
_WINDOW_S = 10.0
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
    """Returns the steps that each running target has written."""
    return {s.name: await s.metric(_STEPS) for s in deployment.named("target")}


async def measured(options: argparse.Namespace) -> Result:
    """Runs everything and returns what it came to."""
    problems = [p.text for p in bundled_problems(find_pack("tiny"), 500)]
    settings = {"prefix_cache_mib": "0"}
    with tempfile.TemporaryDirectory(prefix="arbitrage-scale-") as name:
        async with deployed(Path(name), targets=4, settings=settings) as deployment:
            three = [f"target-{number}" for number in range(3)]
            deployment.write_targets(*three)
            await asyncio.sleep(2.5)
            load = Load(deployment, problems)
            async with asyncio.TaskGroup() as group:
                for number in range(_AT_ONCE):
                    group.create_task(load.work(number))
                await asyncio.sleep(5.0)
                before = await steps_of(deployment)
                deployment.write_targets(*three, "target-3")
                joined_s = time.monotonic()
                while (await steps_of(deployment))["target-3"] <= before["target-3"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                first_s = time.monotonic() - joined_s
                await asyncio.sleep(max(0.0, _WINDOW_S - first_s))
                after = await steps_of(deployment)
                solved_count = load.solved_count
                # It says that it stops before anybody has taken it off the list.
                code = await deployment.services["target-3"].stop(signal.SIGTERM)
                await asyncio.sleep(3.0)
                deployment.write_targets(*three)
                await asyncio.sleep(2.0)
                load.is_over = True
    gained = {name: after[name] - before[name] for name in after}
    share = gained["target-3"] / sum(gained.values())
    for error in load.errors:
        print(f"  failed: {error}")
    claims = (
        Claim(
            "share of the target's steps that a replica writes in its first 10 s", share, "",
            "metrics of the four targets, from the moment it was listed", int(sum(gained.values())),
            Bar("at least", 0.2),
        ),
        Claim(
            "requests failed while it joined and left by SIGTERM", len(load.errors), "requests",
            "client errors", load.solved_count, Bar("at most", 0),
        ),
        Claim(
            "exit code of the replica that left", code, "", "SIGTERM under load", 1,
            Bar("at most", 0),
        ),
    )  # fmt: skip
    rows: tuple[dict[str, object], ...] = (
        {"first_step_after_s": round(first_s, 2), "steps_in_window": gained},
        {"solved_before_leaving": solved_count, "solved_in_all": load.solved_count},
    )
    command = " ".join(["python -m tests.load.scale", *sys.argv[1:]])
    return Result("scale", (), claims, rows, command=command)


def main() -> int:
    """Runs the command line; 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = asyncio.run(asyncio.wait_for(measured(options), 300))
    result.print_claims()
    print(*result.rows, sep="\n")
    if options.json is not None:
        result.write(options.json)
    return 0 if all(claim.as_json()["holds"] for claim in result.claims) else 1


if __name__ == "__main__":
    sys.exit(main())
