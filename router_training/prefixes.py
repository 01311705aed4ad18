"""Who continues a walk: the rules by which prefixes are made that rows are collected from.

A router learns from the prefixes it is shown. Those of the oracle are what the method trains on;
random ones and a router's own are closer to what it meets in production.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from arbitrage.core.ports import Models
from arbitrage.core.steps import Score, Trajectory


@dataclass(frozen=True, slots=True)
class Observed:
    """A step that a rule decides on: its prefix, the draft's text, and the measured advantage."""

    trajectory: Trajectory
    draft_text: str
    advantage: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Whether the target's step continues the walk, and the router's score if it was asked."""

    escalate: bool
    router_score: Score | None = None


class PrefixPolicy(Protocol):
    """Decides whose step continues a walk."""

    @property
    def name(self) -> str:
        """Names the rule in the rows."""
        ...

    async def choose(self, observed: Observed, models: Models) -> Choice:
        """Returns the choice."""
        ...


@dataclass(frozen=True, slots=True)
class OraclePrefixes:
    """Takes the target's step where its reward is higher."""

    name: str = "oracle"

    async def choose(self, observed: Observed, models: Models) -> Choice:
        """Looks at the advantage."""
        return Choice(observed.advantage > 0.0)


@dataclass(frozen=True, slots=True)
class RandomPrefixes:
    """Takes the target's step by a coin that seed, problem and step index decide alone."""

    rate: float
    seed: int
    name: str = "random"

    async def choose(self, observed: Observed, models: Models) -> Choice:
        """Throws the coin."""
        prefix = observed.trajectory
        coin = random.Random(f"{self.seed}\0{len(prefix.steps)}\0{prefix.problem}")  # noqa: S311
        return Choice(coin.random() < self.rate)


@dataclass(frozen=True, slots=True)
class RouterPrefixes:
    """Takes the target's step where the serving router says so."""

    threshold: float
    name: str = "router"

    async def choose(self, observed: Observed, models: Models) -> Choice:
        """Asks the router."""
        score = await models.router.estimate_advantage(observed.trajectory, observed.draft_text)
        return Choice(score.value > self.threshold, score)


def drawn_policy(
    policies: Mapping[PrefixPolicy, float], seed: int, question_id: str
) -> PrefixPolicy:
    """Returns the rule of one question, by its weight; seed and question decide alone."""
    digest = hashlib.sha256(f"{seed}\0{question_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(policies.values())
    for policy, weight in policies.items():
        place -= weight
        if place < 0.0:
            return policy
    return max(policies, key=lambda policy: policies[policy])  # rounding has left nothing over
