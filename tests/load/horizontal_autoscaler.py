"""The HorizontalPodAutoscaler's algorithm, as Kubernetes publishes it, over an object's `behavior`.

https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

# Of the controller: how often it looks, and which difference it leaves alone.
SYNC_S: Final = 15.0
TOLERANCE: Final = 0.1

Behavior = Mapping[str, Any]


def by_average_value(total: float, per_replica: float, current: int) -> int:
    """Returns the replicas wanted for a total that is to be spread evenly over one or more."""
    if abs(total / (per_replica * current) - 1) <= TOLERANCE:
        return current
    return math.ceil(total / per_replica)


def by_utilization(used: Sequence[float | None], wanted: float) -> int:
    """Returns the replicas wanted for a mean use of a resource, as a share of what is requested.

    A replica that is not known yet (None) is taken to use nothing where that makes more of them,
    and all that is wanted where it makes fewer.
    """
    current = len(used)
    known = [use for use in used if use is not None]
    if not known:
        return current
    ratio = sum(known) / len(known) / wanted
    if len(known) < current:
        assumed = 0.0 if ratio > 1 else wanted
        filled = sum(known) + assumed * (current - len(known))
        again = filled / current / wanted
        if (again > 1) != (ratio > 1):
            return current
        ratio = again
    if abs(ratio - 1) <= TOLERANCE:
        return current
    return math.ceil(ratio * current)


def of_metrics(wished: Iterable[int | None], current: int) -> int:
    """Returns the highest wish; where a metric is not known (None), nothing is taken away."""
    wishes = list(wished)
    known = [wish for wish in wishes if wish is not None]
    if not known or (len(known) < len(wishes) and max(known) < current):
        return current
    return max(known)


@dataclass(slots=True)
class HorizontalAutoscaler:
    """Turns wishes into replicas: windows first, then rates, then the bounds."""

    behavior: Behavior
    least: int
    most: int
    _wishes: list[tuple[float, int]] = field(default_factory=list)
    # When replicas were added (above 0) or taken, and how many.
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def replicas(self, wish: int, current: int, now_s: float) -> int:
        """Returns how many there are to be, and takes it that they will be."""
        stable = self._stabilized(wish, current, now_s)
        if stable > current:
            found = min(stable, self._limit(current, now_s, "scaleUp"))
        elif stable < current:
            found = max(stable, self._limit(current, now_s, "scaleDown"))
        else:
            found = current
        found = min(max(found, self.least), self.most)
        if found != current:
            self._changes.append((now_s, found - current))
        return found

    def _stabilized(self, wish: int, current: int, now_s: float) -> int:
        self._wishes.append((now_s, wish))
        up = min(self._within("scaleUp", now_s))
        down = max(self._within("scaleDown", now_s))
        # Up to what was always wished, down to what nobody exceeded.
        return min(max(current, up), down)

    def _within(self, direction: str, now_s: float) -> list[int]:
        window_s = self.behavior[direction]["stabilizationWindowSeconds"]
        *_, last = self._wishes
        return [wish for at_s, wish in self._wishes if at_s > now_s - window_s] or [last[1]]

    def _limit(self, current: int, now_s: float, direction: str) -> int:
        """Returns the farthest number that the direction's policies allow now."""
        rules = self.behavior[direction]
        if rules["selectPolicy"] == "Disabled":
            return current
        sign = 1 if direction == "scaleUp" else -1
        limits = [self._allowed(policy, current, now_s, sign) for policy in rules["policies"]]
        is_farthest = rules["selectPolicy"] == "Max"
        return max(limits) if is_farthest == (sign > 0) else min(limits)

    def _allowed(self, policy: Mapping[str, Any], current: int, now_s: float, sign: int) -> int:
        since_s = now_s - policy["periodSeconds"]
        before = current - sum(change for at_s, change in self._changes if at_s > since_s)
        value = float(policy["value"])
        if policy["type"] == "Pods":
            return int(before + sign * value)
        share = before * (1 + sign * value / 100)
        return math.ceil(share) if sign > 0 else math.floor(share)
