"""When a question goes to a second replica too, because the first is slow, and how often at most.

After Dean and Barroso, "The Tail at Scale" (2013): once, and only behind the time in which nearly
all of the latest answers to such questions had come.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from typing import Final

_KEPT: Final = 256


class Budget:
    """Lets a share of the calls be made once more. What is not used is kept, up to a few."""

    def __init__(self, share: float, most: float) -> None:
        self._share = share
        self._most = self._left = most

    def earn(self) -> None:
        """Counts a call."""
        self._left = min(self._most, self._left + self._share)

    def take(self) -> bool:
        """Takes one call; False where the budget is used up."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class AnswerTimes:
    """How long the latest answers took, by what was asked.

    `quantile` is the share of them that an answer must be behind to be late; with 0, none ever is.
    """

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile
        # Of fewer, not one is later than this share of the others. 1 - 0.9 is less than a tenth.
        self._fewest = math.ceil(round(1.0 / (1.0 - quantile), 6))
        self._latest: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def add(self, question: str, seconds: float) -> None:
        """Counts an answer."""
        if self._quantile:
            self._latest[question].append(seconds)

    def late_s(self, question: str) -> float | None:
        """Returns the seconds behind which an answer is late; None while there is no telling.

        >>> times = AnswerTimes(0.75)
        >>> for seconds in (1.0, 2.0, 9.0):
        ...     times.add("GenerateStep", seconds)
        >>> times.late_s("GenerateStep")
        >>> times.add("GenerateStep", 3.0)
        >>> times.late_s("GenerateStep")
        9.0
        """
        latest = self._latest[question] if self._quantile else ()
        if len(latest) < self._fewest:
            return None
        return sorted(latest)[int(self._quantile * len(latest))]
