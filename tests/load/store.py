"""What does Redis cost a step, and what does it save? `python -m tests.load.store --json FILE`.

Two orchestrators over the same models solve the same problems in turn: one keeps answers in its
own memory, the other answers and sessions in Redis. Then every problem is asked again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from arbitrage.client import Arbitrage, AsyncArbitrageClient, Solution
from benchmarks.results import Bar, Claim, Result, bootstrap
from services.cli.problems import bundled_problems
from services.engines.packs import find_pack
from tests.load.processes import Deployment, deployed

_CALLS = (
    ("draft", 'arbitrage_rpc_requests_total{method="GenerateStep"}'),
    ("target-0", 'arbitrage_rpc_requests_total{method="GenerateStep"}'),
    ("router", 'arbitrage_rpc_requests_total{method="EstimateAdvantage"}'),
)


async def model_calls(deployment: Deployment) -> float:
    """Returns how many steps were written or judged so far."""
    return sum([await deployment.services[name].metric(metric) for name, metric in _CALLS])


async def timed(client: AsyncArbitrageClient, problem: str) -> tuple[Solution, float]:
    """Returns a solution and the milliseconds of each of its steps in the mean."""
    began_s = time.perf_counter()
    solution = await client.solve(problem, policy=Arbitrage())
    return solution, 1000 * (time.perf_counter() - began_s) / max(1, len(solution.steps))


def texts(solution: Solution) -> list[str]:
    return [step.step.text for step in solution.steps]


async def measured(options: argparse.Namespace) -> Result:
    """Runs everything and returns what it came to."""
    problems = [p.text for p in bundled_problems(find_pack("tiny"), options.problems)]
    alone = {"memory": {}, "warming": {"prefix_cache_mib": "0"}}
    with tempfile.TemporaryDirectory(prefix="arbitrage-store-") as name:
        async with (
            deployed(Path(name), targets=1, orchestrators=1, alone=alone) as deployment,
            AsyncArbitrageClient(deployment.services["warming"].address) as warming,
            AsyncArbitrageClient(deployment.services["memory"].address) as memory,
            AsyncArbitrageClient(deployment.addresses) as shared,
        ):
            added, equal = [], 0
            known: dict[str, list[str]] = {}
            for number, problem in enumerate(problems):
                # Both find the models' own prefix caches as warm.
                await warming.solve(problem, policy=Arbitrage())
                order = (memory, shared) if number % 2 else (shared, memory)
                found = {client: await timed(client, problem) for client in order}
                added.append(found[shared][1] - found[memory][1])
                known[problem] = texts(found[shared][0])
                equal += known[problem] == texts(found[memory][0])
            before = await model_calls(deployment)
            again = [await shared.solve(problem, policy=Arbitrage()) for problem in problems[:100]]
            calls = await model_calls(deployment) - before
    same = sum(
        texts(solution) == known[problem]
        for solution, problem in zip(again, problems[:100], strict=True)
    )
    drawn = np.asarray(added)
    interval = bootstrap(len(drawn), lambda at: float(np.median(drawn[at])), seed=0)
    how = "milliseconds of a step at the client, Redis minus memory, paired by problem"
    claims = (
        Claim(
            "what Redis adds to a step, p50", float(np.median(drawn)), "ms", how, len(drawn),
            Bar("at most", 1.5), interval,
        ),
        Claim(
            "model calls for problems that were solved before", calls, "calls",
            "metrics of the model services", len(again), Bar("at most", 0),
        ),
        Claim(
            "repeated solutions with other bytes", len(again) - same, "solutions",
            "text of every step", len(again), Bar("at most", 0),
        ),
        Claim(
            "solutions that differ between the two stores", len(problems) - equal, "solutions",
            "text of every step", len(problems), Bar("at most", 0),
        ),
    )  # fmt: skip
    command = " ".join(["python -m tests.load.store", *sys.argv[1:]])
    rows: tuple[dict[str, object], ...] = (
        {"added_ms_p95": round(float(np.percentile(drawn, 95)), 3)},
    )
    return Result("store", (0,), claims, rows, command=command)


def main() -> int:
    """Runs the command line; 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--problems", type=int, default=200)
    options = parser.parse_args()
    result = asyncio.run(asyncio.wait_for(measured(options), 600))
    result.print_claims()
    if options.json is not None:
        result.write(options.json)
    return 0 if all(claim.as_json()["holds"] for claim in result.claims) else 1


if __name__ == "__main__":
    sys.exit(main())
