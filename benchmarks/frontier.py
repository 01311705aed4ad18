"""Does routing by advantage beat routing by absolute quality?

`python -m benchmarks.frontier --pack tiny --problems 500 --json FILE --plot FILE` draws accuracy
and latency against escalation rate for every policy on the same held-out problems. The real loop
runs against the running services; each question is asked once, one call at a time, and replayed
with its time where another arm asks it again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arbitrage.client import Arbitrage, AsyncArbitrageClient, PolicySpec, Rsd
from arbitrage.core.events import DraftProposed, StepCommitted
from arbitrage.core.ledger import Ledger
from arbitrage.core.policies import (
    ArbitragePolicy,
    DraftOnlyPolicy,
    FirstTokenEntropyPolicy,
    OraclePolicy,
    Policy,
    RandomPolicy,
    RsdPolicy,
    TargetOnlyPolicy,
)
from arbitrage.core.ports import Models
from arbitrage.core.speculation import SolutionRequest, generate_solution
from arbitrage.core.steps import Trajectory
from benchmarks.fleet import Fleet, connected_models, running_fleet
from benchmarks.frontier_claims import Frontier, claims, rows
from benchmarks.frontier_curves import Outcomes, band, plot, spread
from benchmarks.remembered import ENTROPY_TOKEN_COUNT, Memories, ReplayClock
from benchmarks.results import Result
from benchmarks.tiny import attempt
from services.cli.failures import CommandError
from services.cli.problems import BundledProblem, bundled_problems, is_solved
from services.engines.pack_manifest import PackError
from services.engines.packs import find_pack

SEED = 20261124
LIVE_PROBLEMS = 40


@dataclass(frozen=True, slots=True)
class Effort:
    """How fine the sweep is."""

    thresholds: int
    rounds: int
    live_problems: int


FULL = Effort(25, 2000, LIVE_PROBLEMS)
QUICK = Effort(9, 200, 8)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the sweep's thresholds are spread over: scores of drafts on mixed prefixes."""

    router: list[float]
    reward: list[float]
    entropy: list[float]


async def solve(
    problem: BundledProblem, policy: Policy, models: Models, memories: Memories
) -> tuple[list[float], list[tuple[Trajectory, str, str]]]:
    """Runs the loop on one problem.

    Returns solved, steps, routed, escalated, wasted and latency in seconds, and each routed step
    as its prefix, the draft's text and the committed one.
    """
    clock, ledger = ReplayClock(), Ledger()
    request = SolutionRequest(problem.text, policy)
    prefix, proposed = Trajectory(problem.text), ""
    routed: list[tuple[Trajectory, str, str]] = []
    escalated: list[tuple[Trajectory, str, str]] = []
    async for event in generate_solution(
        request, memories.models(models, clock), clock, ledger=ledger
    ):
        if isinstance(event, DraftProposed):
            proposed = event.text
        elif isinstance(event, StepCommitted):
            if event.verdict is not None:
                routed.append((prefix, proposed, event.step.text))
                if event.escalated:
                    escalated.append(routed[-1])
            prefix = prefix.append(event.step)
    text = "\n\n".join(step.text for step in prefix.steps)
    free = memories.models(models, None)
    wasted = 0
    for before, draft, target in escalated:
        # The draft's first: that is the question a policy may ask, and its time must be honest.
        draft_score = (await free.prm.score_step(before, draft)).value
        wasted += (await free.prm.score_step(before, target)).value <= draft_score
    return [
        float(is_solved(text, problem.answer)),
        ledger.step_count,
        ledger.routed_step_count,
        ledger.escalation_count,
        wasted,
        clock.now_s,
    ], routed


async def sweep(
    policies: Mapping[str, Sequence[tuple[float, Policy]]],
    problems: Sequence[BundledProblem],
    models: Models,
) -> dict[str, Outcomes]:
    """Returns every policy's outcomes at every setting.

    Problem by problem, the policies in turn: each finds the services' caches as warm as another,
    as a solution of its own would, and drift of a shared machine meets all alike.
    """
    started_s = time.monotonic()
    tables: dict[str, list[list[list[float]]]] = {
        name: [[] for _ in settings] for name, settings in policies.items()
    }
    names = list(policies)
    for index, problem in enumerate(problems):
        memories = Memories.empty()
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            for arm, (_, policy) in enumerate(policies[name]):
                tables[name][arm].append((await solve(problem, policy, models, memories))[0])
        if (index + 1) % 50 == 0 or index + 1 == len(problems):
            took_s = time.monotonic() - started_s
            left_s = took_s / (index + 1) * (len(problems) - index - 1)
            print(
                f"{index + 1}/{len(problems)} problems, {took_s:.0f} s, {left_s:.0f} s left",
                flush=True,
            )
    found = {}
    for name, table in tables.items():
        arrays = np.moveaxis(np.asarray(table, float), 2, 0)  # [fields, arms, problems]
        found[name] = Outcomes(tuple(setting for setting, _ in policies[name]), *arrays)
    return found


async def look(problems: Sequence[BundledProblem], models: Models) -> Seen:
    """Returns the scores of the drafts that a coin's solutions meet."""
    memories = Memories.empty()
    free, seen = memories.models(models, None), Seen([], [], [])
    for problem in problems:
        for prefix, draft, _ in (await solve(problem, RandomPolicy(0.5, 1), models, memories))[1]:
            reward = (await free.prm.score_step(prefix, draft)).value
            seen.reward.append(reward)
            seen.router.append((await free.router.estimate_advantage(prefix, draft)).value)
    for step, _ in memories.draft.known.values():
        seen.entropy.append(step.first_token_entropy or 0.0)
    return seen


def policies_of(seen: Seen, count: int) -> dict[str, list[tuple[float, Policy]]]:
    """Returns every policy of the sweep with its settings, spread over what scores were seen."""
    rates = np.linspace(0.0, 1.0, max(5, count // 2))[1:-1]
    return {
        "draft_only": [(0.0, DraftOnlyPolicy())],
        "target_only": [(1.0, TargetOnlyPolicy())],
        "arbitrage": [(t, ArbitragePolicy(t)) for t in spread([0.0, *seen.router], count)],
        "rsd": [(s, RsdPolicy(s)) for s in spread([*seen.reward, 1.0], count)],
        "oracle": [
            (t, OraclePolicy(t)) for t in (-0.5, -0.1, -1e-6, 0.0, 0.01, 0.1, 0.3, 0.6, 0.9)
        ],
        "first_token_entropy": [
            (t, FirstTokenEntropyPolicy(t, ENTROPY_TOKEN_COUNT))
            for t in spread(seen.entropy, max(5, count // 2))
        ],
        "random": [(float(r), RandomPolicy(float(r), SEED)) for r in rates],
    }


async def live(
    fleet: Fleet, specs: dict[str, PolicySpec], problems: Sequence[BundledProblem]
) -> dict[str, list[float]]:
    """Returns latencies through the orchestrator, one request at a time, the arms taking turns."""
    found: dict[str, list[float]] = {name: [] for name in specs}
    async with AsyncArbitrageClient(fleet.addresses["orchestrator"]) as client:
        for index, problem in enumerate(problems):
            order = list(specs) if index % 2 else list(reversed(specs))
            for name in order:
                found[name].append((await attempt(client, specs[name], problem)).latency_s)
    return found


async def run(
    pack: str, problem_count: int, effort: Effort, device: str = "cpu"
) -> tuple[Result, Frontier]:
    """Starts the system, measures it and stops it."""
    async with running_fleet(find_pack(pack), device) as fleet:
        problems = bundled_problems(fleet.pack, problem_count)
        async with connected_models(fleet) as (models, _):
            seen = await look(problems[: max(20, problem_count // 4)], models)
            curves = await sweep(policies_of(seen, effort.thresholds), problems, models)
        draft, target = curves.pop("draft_only"), curves.pop("target_only")
        frontier = Frontier(draft, target, curves, SEED, effort.rounds)
        matched = frontier.matched_settings()
        specs: dict[str, PolicySpec] = {
            "arbitrage": Arbitrage(matched["arbitrage"]),
            "rsd": Rsd(matched["rsd"]),
        }
        latencies = await live(fleet, specs, problems[: effort.live_problems])
    result = Result(
        "frontier",
        (SEED,),
        claims(frontier),
        rows=(*rows(frontier), *frontier.live_rows(latencies, effort.live_problems)),
        arms=frontier.arms(),
    )
    return result, frontier


def draw(frontier: Frontier, path: Path) -> None:
    """Draws the plot."""
    bands = {
        name: band(frontier.curves[name], frontier.ends, SEED, min(500, frontier.rounds))
        for name in ("arbitrage", "rsd")
    }
    n = frontier.problem_count
    caption = f"{n} held-out problems of the tiny pack, bands 95 %, {time.strftime('%Y-%m-%d')}"
    plot(str(path), frontier.curves, bands, (frontier.draft, frontier.target), caption)


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pack", default="tiny", help="model pack, by name or path")
    parser.add_argument("--problems", type=int, help="how many held-out problems (500)")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--plot", type=Path, help="where the plot goes, .png or .svg")
    parser.add_argument("--device", default="cpu", help="where the models run, such as cuda")
    parser.add_argument("--quick", action="store_true", help="a coarse sweep of 60 problems")
    asked = parser.parse_args()
    count = asked.problems or (60 if asked.quick else 500)
    try:
        result, frontier = asyncio.run(
            run(asked.pack, count, QUICK if asked.quick else FULL, asked.device)
        )
    except (PackError, CommandError) as error:
        sys.stderr.write(f"frontier: {error}\n")
        return 2
    for row in result.rows:
        print(row)
    result.print_claims()
    if asked.json:
        result.write(asked.json)
    if asked.plot:
        draw(frontier, asked.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
