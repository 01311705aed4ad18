"""Turns a budget into a threshold."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CalibrationTable:
    """Threshold against the share of steps that score above it, by rising threshold.

    The share falls (or stays) as the threshold rises; a table that does not is refused.
    """

    thresholds: tuple[float, ...]
    target_shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.target_shares):
            raise ValueError(
                f"calibration: {len(self.thresholds)} thresholds but "
                f"{len(self.target_shares)} target shares; give one share per threshold"
            )
        for name, values in (("threshold", self.thresholds), ("target_share", self.target_shares)):
            for value in values:
                if not 0.0 <= value <= 1.0:
                    raise ValueError(f"calibration: {name} {value} lies outside [0, 1]")
        rising = all(a < b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False))
        falling = all(
            a >= b for a, b in zip(self.target_shares, self.target_shares[1:], strict=False)
        )
        if not (rising and falling):
            raise ValueError(
                "calibration: thresholds must rise and target shares must not; sort the table"
            )

    def __bool__(self) -> bool:
        return bool(self.thresholds)

    def threshold_for(self, target_share: float) -> float:
        """Returns the lowest threshold expected to escalate no more than `target_share` of steps.

        Between two rows the share is taken as linear; beyond the table's ends the extremes 0
        (escalate all that score above 0) and 1 (escalate nothing) stand.

        >>> table = CalibrationTable((0.2, 0.4, 0.6), (0.9, 0.5, 0.1))
        >>> table.threshold_for(0.5)
        0.4
        >>> round(table.threshold_for(0.3), 3)
        0.5
        >>> table.threshold_for(0.0), table.threshold_for(1.0)
        (1.0, 0.0)
        """
        thresholds = (0.0, *self.thresholds, 1.0)
        shares = (1.0, *self.target_shares, 0.0)
        # Shares fall, so their negatives rise and can be bisected: the first row at or below.
        index = bisect_left([-share for share in shares], -target_share)
        if shares[index] == target_share or index == 0:
            return thresholds[index]
        above, below = shares[index - 1], shares[index]
        weight = (above - target_share) / (above - below)
        return thresholds[index - 1] + weight * (thresholds[index] - thresholds[index - 1])
