"""Runs inputs against a boundary and keeps what is a finding: a wrong error, a crash, a hang.

A boundary either accepts an input or refuses it with an error of its own kind; `attempt` returns
"accepted" or the reason, and whatever else it raises is a finding.
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.load.odd_values import OddValues

ACCEPTED = "accepted"
LONGEST_S = 5.0
# A message is read by people, in a log or at a terminal.
_LONGEST_MESSAGE = 4_096


class Wrong(Exception):
    """What a boundary did with an input is not what it may do."""


class Hung(BaseException):
    """An input took too long. No `Exception`, so that nothing takes it for an error of its own."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """A place where inputs come in. `weight` is its part of all inputs.

    `attempt` is a coroutine function where inputs may be tried at the same time.
    """

    name: str
    weight: float
    draw: Callable[[OddValues], Any]
    attempt: Callable[[Any], str | Awaitable[str]]
    concurrency: int = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """An input that a boundary did not take as it must, and what it did instead."""

    boundary: str
    given: Any
    trace: str


@dataclass(slots=True)
class Tally:
    """What became of a boundary's inputs."""

    boundary: str
    longest_s: float = LONGEST_S
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def input_count(self) -> int:
        """Inputs that were tried."""
        return self.outcomes.total()

    @contextmanager
    def trying(self, given: Any) -> Iterator[None]:
        """Times an attempt, and takes what it raises as a finding."""
        started_s = time.monotonic()
        try:
            yield
        except (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
            raise
        except BaseException:  # noqa: BLE001 - also panics of extension modules: all are findings
            self._found(given, traceback.format_exc())
        took_s = time.monotonic() - started_s
        self.slowest_s = max(self.slowest_s, took_s)
        if took_s > self.longest_s:
            self._found(given, f"it took {took_s:.1f} s")

    def _found(self, given: Any, trace: str) -> None:
        self.outcomes["FINDING"] += 1
        self.findings.append(Finding(self.boundary, given, trace))


@dataclass(frozen=True, slots=True)
class Drive:
    """One run: its seed, and the moment of the monotonic clock at which it ends at the latest.

    An input that takes longer than `longest_s` is a finding; `ends_hangs` also interrupts it, which
    needs the main thread and its alarm.
    """

    seed: int
    deadline_s: float = math.inf
    longest_s: float = LONGEST_S
    ends_hangs: bool = False

    def run(self, boundary: Boundary, count: int) -> Tally:
        """Tries inputs one after the other."""
        tally = Tally(boundary.name, self.longest_s)
        odd = OddValues(f"{self.seed} {boundary.name}")
        for _ in range(count):
            if time.monotonic() >= self.deadline_s:
                break
            given = boundary.draw(odd)
            with tally.trying(given), self._alarm():
                outcome = boundary.attempt(given)
                assert isinstance(outcome, str)
                tally.outcomes[outcome] += 1
        return tally

    async def run_concurrently(self, boundary: Boundary, count: int) -> Tally:
        """Tries as many inputs at the same time as the boundary allows."""
        tally = Tally(boundary.name, self.longest_s)
        odd = OddValues(f"{self.seed} {boundary.name}")
        numbers = iter(range(count))

        async def work() -> None:
            for _ in numbers:
                if time.monotonic() >= self.deadline_s:
                    return
                given = boundary.draw(odd)
                with tally.trying(given):
                    outcome = boundary.attempt(given)
                    assert not isinstance(outcome, str)
                    reason = await outcome
                    tally.outcomes[reason] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(boundary.concurrency):
                group.create_task(work())
        return tally

    @contextmanager
    def _alarm(self) -> Iterator[None]:
        if not self.ends_hangs:
            yield
            return
        signal.setitimer(signal.ITIMER_REAL, self.longest_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)


def end_hangs() -> None:
    """Makes the alarm of `Drive.ends_hangs` an exception."""

    def interrupt(number: int, frame: object) -> None:
        raise Hung("it took too long")

    signal.signal(signal.SIGALRM, interrupt)


def legible(message: str, *, line_count: int = 1) -> str:
    """Returns an error's message, which people must be able to read.

    Raises:
        Wrong
    """
    if not message.strip():
        raise Wrong("the error says nothing")
    if len(message) > _LONGEST_MESSAGE * line_count:
        raise Wrong(f"the error's message has {len(message)} characters: {message[:200]!r}…")
    if line_count == 1 and "\n" in message:
        raise Wrong(f"the error's message has several lines: {message[:400]!r}")
    return message


def saved(finding: Finding, folder: Path, number: int) -> Path:
    """Writes a finding to a file of its own and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{finding.boundary.replace(' ', '-').replace('/', '-')}-{number}.txt"
    path.write_text(f"{finding.given!r}\n\n{finding.trace}", encoding="utf-8", errors="replace")
    return path
