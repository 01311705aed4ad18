"""Collects what draft and target write from the same prefixes, the raw material of the router.

Walks problems with both models; a policy decides whose step is committed, so that the router meets
prefixes like its own. Rows are appended shard by shard, so an interrupted run loses little.
"""

import json
import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from model_packs.tiny.domain import Problem
from model_packs.tiny.generation import STEPS_AT_MOST, StepWriter, WrittenStep

log = logging.getLogger(__name__)
DRAFT: Final = 0
TARGET: Final = 1


@dataclass(frozen=True, slots=True)
class Pair:
    """Holds both models' next step after one prefix, whose steps `writers` wrote."""

    problem_id: str
    problem: str
    steps: tuple[str, ...]
    writers: tuple[int, ...]
    draft_step: str
    target_step: str
    prefix_right: bool
    draft_right: bool
    target_right: bool
    policy: str


class Writes(Protocol):
    """Writes the next step of many prefixes."""

    def write(self, prefixes: Sequence[tuple[str, Sequence[str]]]) -> list[WrittenStep]:
        """Returns the next step of each (problem, steps), in order."""
        ...


class CommitRule(Protocol):
    """Decides which models' steps are committed while walking."""

    @property
    def name(self) -> str:
        """Names the rule in the rows."""
        ...

    def escalate(self, pairs: Sequence[Pair]) -> list[bool]:
        """Returns for each pair whether the target's step is committed."""
        ...


@dataclass(frozen=True, slots=True)
class OracleRule:
    """Commits the target's step exactly where it is right and the draft's is not."""

    name: str = "oracle"

    def escalate(self, pairs: Sequence[Pair]) -> list[bool]:
        """Compares with the exact solution."""
        return [pair.target_right and not pair.draft_right for pair in pairs]


@dataclass(frozen=True, slots=True)
class RandomRule:
    """Commits the target's step by a seeded coin."""

    rate: float
    seed: int
    name: str = "random"
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rng", random.Random(self.seed))

    def escalate(self, pairs: Sequence[Pair]) -> list[bool]:
        """Tosses one coin a pair."""
        return [self._rng.random() < self.rate for _ in pairs]


@dataclass(slots=True)
class _Walk:
    problem: Problem
    steps: list[str] = field(default_factory=list)
    writers: list[int] = field(default_factory=list)
    ended: bool = False

    def pair(self, draft: WrittenStep, target: WrittenStep, policy: str) -> Pair:
        index = len(self.steps)
        prefix_right = tuple(self.steps) == self.problem.steps[:index] and index < len(
            self.problem.steps
        )
        correct = self.problem.steps[index] if prefix_right else None
        return Pair(
            problem_id=self.problem.problem_id,
            problem=self.problem.text,
            steps=tuple(self.steps),
            writers=tuple(self.writers),
            draft_step=draft.text,
            target_step=target.text,
            prefix_right=prefix_right,
            draft_right=draft.text == correct,
            target_right=target.text == correct,
            policy=policy,
        )


@dataclass(frozen=True, slots=True)
class Walked:
    """Holds a finished walk: what was committed, by whom, and the pairs met on the way."""

    problem: Problem
    steps: tuple[str, ...]
    writers: tuple[int, ...]
    pairs: tuple[Pair, ...]

    @property
    def solved(self) -> bool:
        """Says whether the final answer is the right one."""
        return bool(self.steps) and self.steps[-1] == self.problem.steps[-1]


def walk(
    problems: Sequence[Problem], draft: Writes, target: Writes, rule: CommitRule
) -> list[Walked]:
    """Walks all problems together, both models writing every step and the rule committing one."""
    walks = [_Walk(problem) for problem in problems]
    met: list[list[Pair]] = [[] for _ in problems]
    for _ in range(STEPS_AT_MOST):
        live = [i for i, w in enumerate(walks) if not w.ended]
        if not live:
            break
        prefixes = [(walks[i].problem.text, walks[i].steps) for i in live]
        drafts, targets = draft.write(prefixes), target.write(prefixes)
        pairs = [
            walks[i].pair(d, t, rule.name) for i, d, t in zip(live, drafts, targets, strict=True)
        ]
        for i, pair, d, t, up in zip(
            live, pairs, drafts, targets, rule.escalate(pairs), strict=True
        ):
            met[i].append(pair)
            chosen = t if up else d
            walks[i].steps.append(chosen.text)
            walks[i].writers.append(TARGET if up else DRAFT)
            walks[i].ended = chosen.ended
    return [
        Walked(w.problem, tuple(w.steps), tuple(w.writers), tuple(p))
        for w, p in zip(walks, met, strict=True)
    ]


def collect(
    problems: Sequence[Problem], draft: StepWriter, target: StepWriter, path: Path, seed: int
) -> None:
    """Walks problems under a mix of rules, half of them oracle, and appends pairs to `path`."""
    done = {row["problem_id"] for row in _rows(path)}
    todo = [problem for problem in problems if problem.problem_id not in done]
    shard_size = 256
    rules: tuple[CommitRule, ...] = (
        *(OracleRule(), RandomRule(0.5, seed), OracleRule(), RandomRule(0.0, seed, "draft_only")),
    )
    for number, at in enumerate(range(0, len(todo), shard_size)):
        walked = walk(todo[at : at + shard_size], draft, target, rules[number % len(rules)])
        lines = [json.dumps(to_row(pair)) for w in walked for pair in w.pairs]
        with path.open("a") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        log.info("pairs: %d of %d problems", at + len(walked), len(todo))


def to_row(pair: Pair) -> dict[str, object]:
    """Returns a pair as one JSON object."""
    return {name: getattr(pair, name) for name in Pair.__slots__}


def _rows(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_pairs(path: Path) -> list[Pair]:
    """Reads the pairs that `collect` wrote."""
    return [
        Pair(**(row | {"steps": tuple(row["steps"]), "writers": tuple(row["writers"])}))  # type: ignore[arg-type]  # rows come from to_row
        for row in _rows(path)
    ]
