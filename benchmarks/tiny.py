"""Is the shipped miniature a fair one, and does its router pay?

`python -m benchmarks.tiny --json FILE [--problems N]` starts the five services and measures three
things. Accuracy: held-out problems under every policy, several at a time, which changes no answer.
Latency: some of them again, one request at a time, the policies taking turns on each problem so
that drift of a shared machine meets all alike. Advantage: the router's own solutions walked with
both models and the PRM, to see the true Δ of every step it judged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np

from arbitrage.client import (
    Arbitrage,
    AsyncArbitrageClient,
    DraftOnly,
    Oracle,
    PolicySpec,
    Random,
    Rsd,
    Solution,
    TargetOnly,
)
from arbitrage.core.policies import ArbitragePolicy, OraclePolicy
from arbitrage.core.ports import Models, StepRequest
from arbitrage.core.speculation import SolutionRequest, generate_solution
from arbitrage.core.steps import GeneratedStep, Source, Verdict
from benchmarks.fleet import Fleet, connected_models, running_fleet
from benchmarks.results import Bar, Claim, Floats, Result, bootstrap, table
from router_training.metrics import spearman
from services.cli.problems import BundledProblem, bundled_problems, is_solved

T = TypeVar("T")
SEED = 20261123
CONCURRENCY = 8
ACCURACY_GAP_POINTS = 25.0
LEAST_RHO = 0.15
LEAST_KEPT_GAP = 0.95
MOST_TARGET_SHARE = 0.5
LEAST_SPEEDUP = 1.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one policy made of one problem."""

    solved: bool
    latency_s: float
    solution: Solution

    @property
    def target_steps(self) -> int:
        """Steps the target wrote."""
        return sum(c.step.source is Source.TARGET for c in self.solution.steps)


@dataclass(frozen=True, slots=True)
class Observation:
    """A routed step with its router score and both models' process rewards."""

    problem_index: int
    step_index: int
    router_score: float
    draft_score: float
    target_score: float
    escalated: bool

    @property
    def advantage(self) -> float:
        """The true Δ of the step."""
        return self.target_score - self.draft_score


class ObservingPolicy:
    """Decides by the router and looks at the true advantage of every step it decides on."""

    name: ClassVar[str] = ArbitragePolicy.name
    first_writer: ClassVar[Source] = ArbitragePolicy.first_writer
    may_escalate: ClassVar[bool] = ArbitragePolicy.may_escalate
    entropy_token_count: ClassVar[int] = 0

    def __init__(self, threshold: float, problem_index: int) -> None:
        self._by_router = ArbitragePolicy(threshold)
        self._by_reward = OraclePolicy()
        self._problem_index = problem_index
        self.observations: list[Observation] = []

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Returns the router's verdict."""
        verdict = await self._by_router.decide(request, draft, models)
        truth = await self._by_reward.decide(request, draft, models)
        assert verdict.router_score is not None
        assert truth.draft_score is not None
        assert truth.target_score is not None
        self.observations.append(
            Observation(
                self._problem_index,
                len(request.trajectory.steps),
                verdict.router_score.value,
                truth.draft_score.value,
                truth.target_score.value,
                verdict.escalate,
            )
        )
        return verdict


async def attempt(
    client: AsyncArbitrageClient, policy: PolicySpec, problem: BundledProblem
) -> Attempt:
    """Solves one problem; latency is from request in to last step out, at the client."""
    started = time.perf_counter()
    solution = await client.solve(problem.text, policy=policy)
    latency_s = time.perf_counter() - started
    return Attempt(is_solved(solution.text, problem.answer), latency_s, solution)


async def observe(
    models: Models, threshold: float, problems: Sequence[BundledProblem]
) -> list[Observation]:
    """Walks the router's solutions and returns every step it judged."""

    async def walk(index: int, problem: BundledProblem) -> list[Observation]:
        policy = ObservingPolicy(threshold, index)
        async for _ in generate_solution(SolutionRequest(problem.text, policy), models):
            pass
        return policy.observations

    walks = [walk(index, problem) for index, problem in enumerate(problems)]
    return [seen for walked in await _few_at_a_time("advantage", walks) for seen in walked]


async def _few_at_a_time(what: str, work: Sequence[Coroutine[object, object, T]]) -> list[T]:
    places, done = asyncio.Semaphore(CONCURRENCY), 0

    async def one(task: Coroutine[object, object, T]) -> T:
        nonlocal done
        async with places:
            result = await task
        done += 1
        if done % 100 == 0:
            print(f"{what}: {done} of {len(work)}", flush=True)
        return result

    return await asyncio.gather(*map(one, work))


def arm_summary(
    name: str, attempts: Sequence[Attempt], timed: Sequence[Attempt]
) -> dict[str, object]:
    """Returns one arm's row: accuracy, escalations and tokens, and the latency of `timed`."""
    solved = np.array([a.solved for a in attempts], float)
    latency_s = np.array([a.latency_s for a in timed])
    ledgers = [a.solution.ledger for a in attempts]
    steps = sum(ledger.step_count for ledger in ledgers)
    routed = sum(ledger.routed_step_count for ledger in ledgers)
    escalated = sum(ledger.escalation_count for ledger in ledgers)
    low, high = bootstrap(len(attempts), lambda drawn: float(solved[drawn].mean()), SEED)
    return {
        "policy": name,
        "n": len(attempts),
        "solved": int(solved.sum()),
        "accuracy": round(float(solved.mean()), 4),
        "accuracy_interval": [round(low, 4), round(high, 4)],
        "timed": len(timed),
        "mean_latency_s": round(float(latency_s.mean()), 4),
        "p50_latency_s": round(float(np.percentile(latency_s, 50)), 4),
        "p95_latency_s": round(float(np.percentile(latency_s, 95)), 4),
        "target_share": round(sum(a.target_steps for a in attempts) / max(1, steps), 4),
        "escalation_rate": round(escalated / max(1, routed), 4),
        "target_calls": sum(ledger.target.call_count for ledger in ledgers),
        "escalations": escalated,
        "draft_tokens_kept": sum(ledger.draft.kept_count for ledger in ledgers),
        "draft_tokens_discarded": sum(ledger.draft.discarded_count for ledger in ledgers),
        "target_tokens_kept": sum(ledger.target.kept_count for ledger in ledgers),
        "target_tokens_discarded": sum(ledger.target.discarded_count for ledger in ledgers),
    }


def wasted_share(attempts: Sequence[Attempt]) -> float:
    """Returns the share of escalations whose target step scored no higher, where both are known."""
    judged = [
        c.verdict.target_score.value <= c.verdict.draft_score.value
        for a in attempts
        for c in a.solution.steps
        if c.escalated and c.verdict and c.verdict.draft_score and c.verdict.target_score
    ]
    return sum(judged) / len(judged) if judged else float("nan")


def break_even(attempts: Sequence[Attempt], alone: Sequence[Attempt]) -> dict[str, float]:
    """Returns the acceptance from which the loop beats the target alone: (T_d + T_r) / T_t."""
    committed = [c for a in attempts for c in a.solution.steps]
    target_s = float(np.mean([c.target_time_s for a in alone for c in a.solution.steps]))
    draft_s = float(np.mean([c.draft_time_s for c in committed]))
    router_s = float(np.mean([c.decision_time_s for c in committed]))
    accepted = float(np.mean([not c.escalated for c in committed]))
    return {
        "draft_step_s": round(draft_s, 5),
        "router_step_s": round(router_s, 5),
        "target_step_s": round(target_s, 5),
        "break_even_acceptance": round((draft_s + router_s) / target_s, 4),
        "acceptance": round(accepted, 4),
    }


def latency_claim(timed: Mapping[str, Sequence[Attempt]]) -> Claim:
    """Returns whether a request is quicker than with the target alone."""
    alone, routed = (
        np.array([a.latency_s for a in timed[name]]) for name in ("target_only", "arbitrage")
    )

    def speedup(drawn: np.ndarray) -> float:
        return float(alone[drawn].mean() / routed[drawn].mean())

    n = len(routed)
    return Claim(
        "mean latency of target_only over that of arbitrage",
        speedup(np.arange(n)),
        "×",
        "one request at a time, the policies in turn on each problem; bootstrap over problems",
        n,
        Bar("above", LEAST_SPEEDUP),
        bootstrap(n, speedup, SEED),
    )


def claims(
    arms: dict[str, list[Attempt]], observations: Sequence[Observation]
) -> tuple[Claim, ...]:
    """Returns what makes the miniature a fair one, and its router a useful one."""
    solved = {name: np.array([a.solved for a in arm], float) for name, arm in arms.items()}
    draft, target, routed = solved["draft_only"], solved["target_only"], solved["arbitrage"]
    n = len(draft)

    def gap(drawn: np.ndarray) -> float:
        return float(100 * (target[drawn] - draft[drawn]).mean())

    def kept(drawn: np.ndarray) -> float:
        whole_gap = (target[drawn] - draft[drawn]).sum()
        # A resample without a gap has nothing to keep; `bootstrap` leaves it out.
        return float((routed[drawn] - draft[drawn]).sum() / whole_gap) if whole_gap else math.nan

    whole = np.arange(n)
    by_target = np.array([a.target_steps for a in arms["arbitrage"]], float)
    steps = np.array([len(a.solution.steps) for a in arms["arbitrage"]], float)

    def share(drawn: np.ndarray) -> float:
        return float(by_target[drawn].sum() / steps[drawn].sum())

    by_problem = [[o for o in observations if o.problem_index == i] for i in range(n)]

    def rho(drawn: np.ndarray) -> float:
        chosen = [o for index in drawn for o in by_problem[index]]
        scores: Floats = np.array([o.router_score for o in chosen])
        return spearman(scores, np.array([o.advantage for o in chosen]))

    rho_interval = bootstrap(n, rho, SEED, 1000)
    calls = sum(a.solution.ledger.target.call_count for a in arms["arbitrage"])
    escalations = sum(a.solution.ledger.escalation_count for a in arms["arbitrage"])
    how = "held-out problems through the running services, bootstrap over problems"
    return (
        Claim(
            "accuracy of target_only above draft_only",
            gap(whole),
            "points",
            how,
            n,
            Bar("at least", ACCURACY_GAP_POINTS),
            bootstrap(n, gap, SEED),
        ),
        Claim(
            "Spearman ρ of the router's score with Δ on held-out steps, lower end of the interval",
            rho(whole),
            "",
            "every step the router judged on its own prefixes; both steps scored "
            "by the PRM; bootstrap over problems",
            len(observations),
            Bar("above", LEAST_RHO),
            rho_interval,
            judged=rho_interval[0],
        ),
        Claim(
            "share of the accuracy gap that arbitrage keeps at its default threshold",
            kept(whole),
            "",
            how,
            n,
            Bar("at least", LEAST_KEPT_GAP),
            bootstrap(n, kept, SEED),
        ),
        Claim(
            "share of steps the target writes under arbitrage",
            share(whole),
            "",
            how,
            n,
            Bar("at most", MOST_TARGET_SHARE),
            bootstrap(n, share, SEED),
        ),
        Claim(
            "target calls that were no escalation",
            calls - escalations,
            "calls",
            "from the ledgers of the arbitrage arm",
            n,
            Bar("at most", 0),
        ),
    )


ARMS: dict[str, PolicySpec] = {
    "draft_only": DraftOnly(),
    "target_only": TargetOnly(),
    "arbitrage": Arbitrage(),
    "rsd": Rsd(),
    "oracle": Oracle(),
}


async def solve_all(
    client: AsyncArbitrageClient, arms: Mapping[str, PolicySpec], problems: Sequence[BundledProblem]
) -> dict[str, list[Attempt]]:
    """Returns every arm's attempts, several problems at a time."""
    return {
        name: await _few_at_a_time(name, [attempt(client, policy, p) for p in problems])
        for name, policy in arms.items()
    }


async def time_all(
    client: AsyncArbitrageClient, arms: Mapping[str, PolicySpec], problems: Sequence[BundledProblem]
) -> dict[str, list[Attempt]]:
    """Returns every arm's attempts, one request at a time.

    Who begins changes with the problem: whoever comes first pays for reading it, the others find
    it in the models' caches.
    """
    found: dict[str, list[Attempt]] = {name: [] for name in arms}
    order = list(arms)
    for index, problem in enumerate(problems):
        shift = index % len(order)
        for name in order[shift:] + order[:shift]:
            found[name].append(await attempt(client, arms[name], problem))
    return found


async def run(problem_count: int, timed_count: int) -> Result:
    """Starts the system, measures it and stops it."""
    async with running_fleet() as fleet:
        return await measure(fleet, bundled_problems(fleet.pack, problem_count), timed_count)


async def measure(fleet: Fleet, problems: Sequence[BundledProblem], timed_count: int) -> Result:
    """Runs everything and returns the result."""
    async with AsyncArbitrageClient(fleet.addresses["orchestrator"]) as client:
        # First, while nothing has been asked yet, so that latency is not that of a warm cache.
        timed = await time_all(client, ARMS, problems[-timed_count:])
        arms = await solve_all(client, ARMS, problems)
        ledgers = [a.solution.ledger for a in arms["arbitrage"]]
        routed = sum(ledger.routed_step_count for ledger in ledgers)
        rate = sum(ledger.escalation_count for ledger in ledgers) / max(1, routed)
        control = {"random": Random(rate, SEED)}
        arms |= await solve_all(client, control, problems)
        timed |= await time_all(client, control, problems[-timed_count:])
    async with connected_models(fleet) as (models, router):
        threshold = (await router.describe()).default_threshold
        observations = await observe(models, threshold, problems)
    return Result(
        "tiny",
        (SEED,),
        (*claims(arms, observations), latency_claim(timed)),
        arms=tuple(arm_summary(name, attempts, timed[name]) for name, attempts in arms.items()),
        rows=(
            {"name": "cost_law", **break_even(timed["arbitrage"], timed["target_only"])},
            {"name": "advantage", "default_threshold": threshold, **waste(arms, observations)},
        ),
    )


def waste(
    arms: Mapping[str, Sequence[Attempt]], observations: Sequence[Observation]
) -> dict[str, object]:
    """Returns how often the target was better, and how often it was called where it was not."""
    escalated = [o for o in observations if o.escalated]
    return {
        "judged_steps": len(observations),
        "steps_with_advantage": round(float(np.mean([o.advantage > 0 for o in observations])), 4),
        "wasted_escalations_arbitrage": round(
            float(np.mean([o.advantage <= 0 for o in escalated])), 4
        ),
        "wasted_escalations_oracle": round(wasted_share(arms["oracle"]), 4),
    }


def print_arms(rows: Sequence[dict[str, object]]) -> None:
    """Prints the comparison a person reads."""
    columns = (
        "policy",
        "solved",
        "accuracy",
        "accuracy_interval",
        "mean_latency_s",
        "p50_latency_s",
        "p95_latency_s",
        "target_share",
        "target_tokens_kept",
        "draft_tokens_discarded",
    )
    shown = [[row[column] for column in columns] for row in rows]
    print(table(columns, shown))


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--problems", type=int, default=500, help="how many held-out problems")
    parser.add_argument("--timed", type=int, default=60, help="how many of them are timed")
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments.problems, arguments.timed))
    print_arms(result.arms)
    for row in result.rows:
        print(json.dumps(row))
    result.print_claims()
    if arguments.json:
        result.write(arguments.json)


if __name__ == "__main__":
    main()
