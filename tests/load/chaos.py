"""Kills, pauses and restarts every part of a running system under load, and counts what is lost.

`python -m tests.load.chaos --json FILE`: requests run undisturbed first, then again while faults
come one at a time; then an orchestrator is killed at every step of some requests. Loopback only,
bounded in count and time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from arbitrage.client import Arbitrage, AsyncArbitrageClient
from arbitrage.core.errors import ArbitrageError
from arbitrage.core.events import Event, StepCommitted
from benchmarks.results import Bar, Claim, Result, table
from services.cli.problems import bundled_problems
from services.engines.packs import find_pack
from tests.load.processes import Deployment, Service, deployed

_PAUSE_S = 5.0
# A phase's fault comes after one to so many steps of it.
_LATEST_FAULT_STEP = 12
_AT_ONCE = 16
_RETRIES = 8


@dataclass
class Answer:
    """One request's way: its steps, and when it ran."""

    problem: str
    request_id: str
    began_s: float = 0.0
    ended_s: float = 0.0
    steps: list[StepCommitted] = field(default_factory=list)
    step_times_s: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s

    @property
    def texts(self) -> list[tuple[str, str]]:
        return [(step.step.text, step.step.source.value) for step in self.steps]

    @property
    def degraded(self) -> int | None:
        """Index of the first degraded step."""
        return next((i for i, step in enumerate(self.steps) if step.degradations), None)


@dataclass
class Fault:
    """Something that was done to the system, and how long it was felt."""

    what: str
    began_s: float = 0.0
    recovered_s: float = 0.0
    in_flight: int = 0
    # From the fault to the next step of a request that was in flight: the quickest, the slowest.
    next_step_s: tuple[float, float] = (0.0, 0.0)


@dataclass
class Load:
    """Sends requests, so many at once, and keeps what came back."""

    deployment: Deployment
    prefix: str
    answers: list[Answer] = field(default_factory=list)

    @property
    def step_count(self) -> int:
        """Steps that have come so far."""
        return sum(len(answer.steps) for answer in self.answers)

    async def run(self, problems: Sequence[str]) -> None:
        """Solves the problems and returns when all are solved."""
        queue = list(reversed(problems))
        addresses = self.deployment.addresses

        async def work(number: int) -> None:
            shifted = addresses[number % len(addresses) :] + addresses[: number % len(addresses)]
            async with AsyncArbitrageClient(shifted, retries=_RETRIES) as client:
                while queue:
                    await self._solve(client, queue.pop())

        async with asyncio.TaskGroup() as group:
            for number in range(min(_AT_ONCE, len(problems))):
                group.create_task(work(number))

    async def _solve(self, client: AsyncArbitrageClient, problem: str) -> None:
        answer = Answer(problem, f"{self.prefix}-{len(self.answers)}", time.monotonic())
        self.answers.append(answer)
        try:
            await follow(client, answer)
        except ArbitrageError as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.ended_s = time.monotonic()


async def follow(
    client: AsyncArbitrageClient,
    answer: Answer,
    on_step: Callable[[int], Awaitable[None]] | None = None,
) -> list[Event]:
    """Streams one solution into its answer."""
    events: list[Event] = []
    stream = client.stream(
        answer.problem,
        policy=Arbitrage(),
        allow_degraded=True,
        request_id=answer.request_id,
        timeout_s=120.0,
    )
    async with aclosing(stream):
        async for event in stream:
            events.append(event)
            if isinstance(event, StepCommitted):
                answer.steps.append(event)
                answer.step_times_s.append(time.monotonic())
                if on_step is not None:
                    await on_step(len(answer.steps))
    return events


async def disturbed(
    deployment: Deployment, faults: Sequence[str], problems: Sequence[str], coin: random.Random
) -> tuple[Load, list[Fault]]:
    """Runs the problems in phases; in each a fault comes while requests are in flight."""
    load, seen = Load(deployment, "disturbed"), []
    cuts = np.linspace(0, len(problems), len(faults) + 1).astype(int)
    for name, start, end in zip(faults, cuts[:-1], cuts[1:], strict=True):
        phase = list(problems[start:end])
        middle = max(1, 2 * len(phase) // 3)
        fault = Fault(name)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(phase[:middle]))
            wanted = load.step_count + coin.randint(1, _LATEST_FAULT_STEP)
            while load.step_count < wanted:  # noqa: ASYNC110 - steps come to many tasks
                await asyncio.sleep(0.002)
            await strike(deployment, fault, load)
        # The rest of the phase sees a system that is whole again.
        await load.run(phase[middle:])
        running = [a for a in load.answers if a.began_s < fault.began_s < a.ended_s]
        fault.in_flight = len(running)
        gaps = [
            next((t - fault.began_s for t in a.step_times_s if t > fault.began_s), 0.0)
            for a in running
        ]
        fault.next_step_s = min(gaps, default=0.0), max(gaps, default=0.0)
        seen.append(fault)
        print(
            f"  {name}: {fault.in_flight} in flight, their next steps after "
            f"{fault.next_step_s[0]:.2f} to {fault.next_step_s[1]:.2f} s, whole after "
            f"{fault.recovered_s - fault.began_s:.1f} s",
            flush=True,
        )
    return load, seen


async def strike(deployment: Deployment, fault: Fault, load: Load) -> None:
    """Does it, and returns once the system is whole again."""
    kind, _, name = fault.what.partition(" ")
    fault.began_s = time.monotonic()
    if kind == "pause":
        service = deployment.services[name]
        service.send(signal.SIGSTOP)
        await asyncio.sleep(_PAUSE_S)
        service.send(signal.SIGCONT)
    elif name == "redis":
        await asyncio.to_thread(deployment.redis.kill)
        await asyncio.to_thread(deployment.redis.start)
    else:
        service = deployment.services[name]
        await service.stop()
        service.launch()
        await service.ready()
    fault.recovered_s = time.monotonic()


async def resumed(
    deployment: Deployment, expected: Sequence[Answer]
) -> tuple[int, int, int, list[float]]:
    """Kills an orchestrator at every step of some requests.

    Returns the kills, the answers that differ, the most steps redone for one kill, and the seconds
    from each kill to the next step.
    """
    kills = differing = most_redone = 0
    gaps: list[float] = []
    draft = deployment.services["draft"]
    method = 'arbitrage_rpc_requests_total{method="GenerateStep"}'
    orchestrators = deployment.named("orchestrator")
    for answer in expected:
        for at in range(len(answer.steps)):
            first = orchestrators[kills % len(orchestrators)]
            await first.ready()
            other = orchestrators[(kills + 1) % len(orchestrators)]
            await other.ready()
            again = Answer(answer.problem, f"resumed-{kills}")
            killed_s = [0.0]

            async def kill_at(
                count: int, at: int = at, first: Service = first, killed_s: list[float] = killed_s
            ) -> None:
                if count == at + 1 and not killed_s[0]:
                    await first.stop()
                    killed_s[0] = time.monotonic()
                    first.launch()

            before = await draft.metric(method)
            addresses = [first.address, other.address]
            async with AsyncArbitrageClient(addresses, retries=_RETRIES) as client:
                await follow(client, again, kill_at)
            redone = round(await draft.metric(method) - before) - drafted(again)
            kills += 1
            differing += again.texts != answer.texts
            most_redone = max(most_redone, redone)
            later = [moment for moment in again.step_times_s if moment > killed_s[0]]
            if later:
                gaps.append(later[0] - killed_s[0])
    return kills, differing, most_redone, gaps


def drafted(answer: Answer) -> int:
    """Returns how many draft calls an answer takes when nothing goes wrong."""
    # A last step that is cut off by the end of sequence alone takes one more call.
    last = answer.steps[-1].step.stop_reason.value if answer.steps else ""
    return len(answer.steps) + (last != "end_of_sequence")


def same_where_whole(answer: Answer, calm: Answer) -> bool:
    """Whether an answer is that of the undisturbed run, up to its first degraded step."""
    end = answer.degraded
    return answer.texts[:end] == (calm.texts if end is None else calm.texts[:end])


async def replays(deployment: Deployment, answers: Sequence[Answer]) -> int:
    """Asks for every solution again, and returns how many are not told as they were."""
    differing = 0
    async with AsyncArbitrageClient(deployment.addresses, retries=_RETRIES) as client:
        for answer in answers:
            again = Answer(answer.problem, answer.request_id)
            await follow(client, again)
            differing += again.texts != answer.texts
    return differing


def percentiles(answers: Sequence[Answer]) -> tuple[float, float]:
    """Returns p50 and p95 of the latency, in seconds."""
    if not answers:
        return float("nan"), float("nan")
    p50, p95 = np.percentile([answer.seconds for answer in answers], [50, 95])
    return float(p50), float(p95)


async def measured(options: argparse.Namespace) -> Result:
    """Runs everything and returns what it came to."""
    coin = random.Random(options.seed)
    problems = [p.text for p in bundled_problems(find_pack("tiny"), options.requests)]
    targets = [f"target-{number}" for number in range(options.targets)]
    faults = [f"kill {name}" for name in (*targets, "router", "draft", "orchestrator-0", "redis")]
    faults.append(f"pause {targets[-1]}")
    if options.faults:
        faults = options.faults.split(",")
    else:
        coin.shuffle(faults)
    with tempfile.TemporaryDirectory(prefix="arbitrage-chaos-") as name:
        async with deployed(Path(name), targets=options.targets) as deployment:
            await Load(deployment, "warm").run(problems[:4])
            deployment.redis.client().flushall()
            started_s = time.monotonic()
            calm = Load(deployment, "calm")
            await calm.run(problems)
            print(f"undisturbed: {time.monotonic() - started_s:.0f} s", flush=True)
            # Nothing that was known is known, or the models would not be asked.
            deployment.redis.client().flushall()
            load, seen = await disturbed(deployment, faults, problems, coin)
            failed = [answer for answer in load.answers if answer.error]
            whole = [answer for answer in load.answers if not answer.error]
            retold = await replays(deployment, whole)
            deployment.redis.client().flushall()
            expected = [a for a in calm.answers if not a.error][: options.resumed]
            kills, differing, redone, gaps = await resumed(deployment, expected)
    for answer in failed:
        print(f"  failed: {answer.request_id}: {answer.error}")
    known = {answer.problem: answer for answer in calm.answers}
    unequal = [a for a in whole if not same_where_whole(a, known[a.problem])]
    degraded = [step for a in whole for step in a.steps if step.degradations]
    kinds: dict[str, int] = {}
    for step in degraded:
        for degradation in step.degradations:
            kinds[degradation.value] = kinds.get(degradation.value, 0) + 1
    untouched = [
        answer
        for answer in whole
        if all(answer.ended_s < f.began_s or f.recovered_s < answer.began_s for f in seen)
    ]
    calm_p50, calm_p95 = percentiles(calm.answers)
    p50, p95 = percentiles(untouched)
    none = Bar("at most", 0)
    count = len(load.answers)

    def claim(name: str, value: float, unit: str, how: str, n: int, bar: Bar) -> Claim:
        return Claim(name, value, unit, how, n, bar)

    claims = (
        claim("requests failed under faults", len(failed), "requests", "errors", count, none),
        claim(
            "answers that differ from the undisturbed run before any degraded step",
            len(unequal), "answers", "text and writer of every step", count, none,
        ),
        claim(
            "solutions lost or doubled in the store", retold, "solutions",
            "every request_id asked again, steps compared", len(whole), none,
        ),
        claim(
            "faults that met requests in flight", sum(f.in_flight > 0 for f in seen), "faults",
            "requests between their first and last byte", len(seen), Bar("at least", len(seen)),
        ),
        claim(
            "answers that differ after an orchestrator was killed at each step", differing,
            "answers", "kill -9 after the step was received", kills, none,
        ),
        claim(
            "most steps redone for one kill", redone, "steps",
            "draft calls beyond those of the solution", kills, Bar("at most", 1),
        ),
    )  # fmt: skip
    rows: list[dict[str, object]] = [
        {
            "fault": f.what,
            "in_flight": f.in_flight,
            "first_step_again_s": round(f.next_step_s[0], 3),
            "last_step_again_s": round(f.next_step_s[1], 3),
            "whole_again_s": round(f.recovered_s - f.began_s, 3),
        }
        for f in seen
    ]
    rows += [
        {
            "latency_s": "undisturbed", "p50": round(calm_p50, 3), "p95": round(calm_p95, 3),
            "n": len(calm.answers),
        },
        {
            "latency_s": "not touched by a fault", "p50": round(p50, 3), "p95": round(p95, 3),
            "n": len(untouched),
        },
        {"degraded_steps": len(degraded), "by_kind": kinds, "of": sum(len(a.steps) for a in whole)},
        {
            "resume_gap_s": "kill to next step",
            "p50": round(float(np.median(gaps)), 3) if gaps else None,
            "max": round(max(gaps), 3) if gaps else None,
        },
    ]  # fmt: skip
    return Result(
        "chaos", (options.seed,), claims, tuple(rows),
        command=" ".join(["python -m tests.load.chaos", *sys.argv[1:]]),
    )  # fmt: skip


def main() -> int:
    """Runs the command line; 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--targets", type=int, default=3)
    parser.add_argument("--resumed", type=int, default=20, help="requests to kill at every step")
    parser.add_argument("--faults", default="", help="in this order, with commas; else all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, default=600.0)
    options = parser.parse_args()
    result = asyncio.run(asyncio.wait_for(measured(options), options.timeout_s))
    result.print_claims()
    found = result.as_json()
    rows = found.get("rows", [])
    assert isinstance(rows, list)
    print(table(("row",), [(row,) for row in rows]))
    if options.json is not None:
        result.write(options.json)
    return 0 if all(claim.as_json()["holds"] for claim in result.claims) else 1


if __name__ == "__main__":
    sys.exit(main())
