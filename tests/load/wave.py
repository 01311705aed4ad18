"""A load whose height changes while it runs, and what was seen meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from arbitrage.client import Arbitrage, AsyncArbitrageClient
from arbitrage.core.errors import ArbitrageError
from tests.load.autoscaled import Look


@dataclass(frozen=True, slots=True)
class Solved:
    """One request: the phase it began in, its seconds, and what went wrong."""

    phase: str
    seconds: float
    error: str


@dataclass
class Wave:
    """So many users, each with one problem after the other."""

    rule: str
    addresses: Sequence[str]
    problems: Sequence[str]
    began_s: float = field(default_factory=time.monotonic)
    phase: str = ""
    # When each phase began, and what else was done, since the beginning.
    marks_s: dict[str, float] = field(default_factory=dict)
    solved: list[Solved] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    _wanted: int = 0
    _users: list[asyncio.Task[None]] = field(default_factory=list)
    _looked: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def now_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began_s

    def mark(self, what: str) -> None:
        """Keeps when something was done."""
        self.marks_s[what] = self.now_s

    def users(self, count: int, phase: str) -> None:
        """Says how many there are from now on; who goes finishes what they have begun."""
        self._wanted, self.phase = count, phase
        self.mark(phase)
        for number in range(len(self._users), count):
            self._users.append(asyncio.create_task(self._solve(number)))

    async def over(self) -> None:
        """Lets all users go, and waits until they have."""
        self._wanted = 0
        await asyncio.gather(*self._users)

    def saw(self, look: Look) -> None:
        """Keeps what the autoscaler did."""
        self.looks.append(look)
        seen = ", ".join(
            f"{name} {'unknown' if value is None else f'{value:.2f}'}"
            for name, value in look.values.items()
        )
        print(
            f"  {look.at_s - self.began_s:4.0f} s  {self.phase:>5}  {seen}; {look.wished} wished, "
            f"{look.before} -> {look.replicas}, {look.ready} ready",
            flush=True,
        )
        self._looked.set()

    async def looked(self, count: int = 1) -> None:
        """Waits for the autoscaler's next looks."""
        for _ in range(count):
            self._looked.clear()
            await self._looked.wait()

    def seconds_to(self, replicas: int) -> float:
        """Returns how long after the load rose so many replicas were asked for; inf if never."""
        risen_s = self.began_s + self.marks_s["5x"]
        return next(
            (x.at_s - risen_s for x in self.looks if x.at_s > risen_s and x.replicas >= replicas),
            float("inf"),
        )

    def seconds_to_more(self) -> float:
        """Returns how long after the load rose one more was asked for; inf if never."""
        risen_s = self.began_s + self.marks_s["5x"]
        return self.seconds_to([x.replicas for x in self.looks if x.at_s <= risen_s][-1] + 1)

    def latencies(self) -> tuple[dict[str, object], ...]:
        """Returns requests and their seconds by phase."""
        found: list[dict[str, object]] = []
        for phase in dict.fromkeys(one.phase for one in self.solved):
            seconds = [one.seconds for one in self.solved if one.phase == phase]
            p50, p95 = np.percentile(seconds, [50, 95])
            name = f"{self.rule}, {phase}"
            found.append(
                {
                    "arm": name,
                    "n": len(seconds),
                    "p50_s": round(float(p50), 2),
                    "p95_s": round(float(p95), 2),
                }
            )
        return tuple(found)

    async def _solve(self, number: int) -> None:
        async with AsyncArbitrageClient(self.addresses) as client:
            while number < self._wanted:
                problem = self.problems[(len(self.solved) + number) % len(self.problems)]
                phase, began_s, error = self.phase, time.monotonic(), ""
                try:
                    await client.solve(problem, policy=Arbitrage())
                except ArbitrageError as failure:
                    error = f"{type(failure).__name__}: {failure}"
                self.solved.append(Solved(phase, time.monotonic() - began_s, error))
