"""The one shape of every benchmark's result, and the statistics they share.

A claim is one line of what was to be shown, with the value measured, the bar it is held to, and
whether it holds; a claim that does not hold stays in the file.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bar:
    """What a value is held to: `at least`, `at most` or `above` a number."""

    relation: str
    value: float

    def holds(self, value: float) -> bool:
        """Whether `value` meets the bar."""
        match self.relation:
            case "at least":
                return value >= self.value
            case "at most":
                return value <= self.value
            case "above":
                return value > self.value
        raise ValueError(f"unknown relation {self.relation!r}")


@dataclass(frozen=True, slots=True)
class Claim:
    """One line of what was to be shown.

    `interval` is the 95 % one unless `how` says otherwise; the bar is held against `judged`, which
    is `value` unless set.
    """

    name: str
    value: float
    unit: str
    how: str
    n: int
    bar: Bar
    interval: tuple[float, float] | None = None
    judged: float | None = None

    def as_json(self) -> dict[str, object]:
        """Returns the claim as it stands in a result file."""
        judged = self.value if self.judged is None else self.judged
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "interval": None if self.interval is None else [round(v, 4) for v in self.interval],
            "unit": self.unit,
            "bar": f"{self.bar.relation} {self.bar.value:g}",
            "holds": self.bar.holds(judged),
            "n": self.n,
            "how": self.how,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """What a benchmark measured."""

    benchmark: str
    seeds: tuple[int, ...]
    claims: tuple[Claim, ...]
    rows: tuple[dict[str, object], ...] = ()
    arms: tuple[dict[str, object], ...] = ()
    command: str = field(default_factory=lambda: _command())

    def as_json(self) -> dict[str, object]:
        """Returns the result with where and when it was measured."""
        found: dict[str, object] = {
            "benchmark": self.benchmark,
            "command": self.command,
            "commit": commit(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": machine(),
            "seeds": list(self.seeds),
            "claims": [claim.as_json() for claim in self.claims],
        }
        if self.arms:
            found["arms"] = list(self.arms)
        if self.rows:
            found["rows"] = list(self.rows)
        return found

    def write(self, path: Path) -> None:
        """Writes the result, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        partial.replace(path)

    def print_claims(self) -> None:
        """Prints a line per claim."""
        for claim in self.claims:
            shown = claim.as_json()
            interval = "" if claim.interval is None else f" {shown['interval']}"
            verdict = "holds" if shown["holds"] else "DOES NOT HOLD"
            print(f"{verdict:>13}  {claim.name}: {shown['value']} {claim.unit}{interval}", end="")
            print(f", {shown['bar']} (n = {claim.n})")


def _command() -> str:
    module = Path(sys.argv[0]).stem
    return " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]])


def commit() -> str:
    """Returns the commit the code was at, with `+` where the tree had changes."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    )
    if found.returncode != 0:
        return "unknown"
    tracked = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results"]
    changed = subprocess.run(tracked, capture_output=True, text=True).stdout.strip()
    return found.stdout.strip() + ("+" if changed else "")


def machine() -> dict[str, object]:
    """Describes the machine a result was measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "accelerator": None,
    }


def bootstrap(
    clusters: int, statistic: Callable[[NDArray[np.intp]], float], seed: int, rounds: int = 2000
) -> tuple[float, float]:
    """Returns the 95 % percentile interval of `statistic` over resampled cluster indices.

    `statistic` takes the drawn indices, `[clusters]` with repeats. What is paired within a cluster
    (all arms of a problem, all steps of a problem) stays paired.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(0, clusters, clusters)) for _ in range(rounds)]
    finite = np.asarray([value for value in drawn if np.isfinite(value)])
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a plain text table with aligned columns."""
    cells = [list(headings), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(lines)
