"""From scores to labels, from rows to splits: pure functions."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left
from collections.abc import Sequence
from enum import Enum

import numpy as np

from router_training.errors import DatasetInvalid
from router_training.rows import Row


class Split(Enum):
    """What a question's rows are for."""

    TRAINING = "training"
    VALIDATION = "validation"
    TEST = "test"


def advantage(draft_score: float, target_scores: Sequence[float]) -> float:
    """Returns Δ: the mean reward of the target's samples minus that of the draft's step.

    >>> round(advantage(0.4, [0.9, 0.7]), 6)
    0.4
    """
    return sum(target_scores) / len(target_scores) - draft_score


def binary_label(gap: float, margin: float = 0.0) -> int:
    """Returns 1 where the target's step is better by more than `margin`; ties are 0.

    >>> binary_label(0.0), binary_label(0.05), binary_label(0.05, margin=0.1)
    (0, 1, 0)
    """
    return int(gap > margin)


def class_edges(gaps: Sequence[float], class_count: int, margin: float) -> tuple[float, ...]:
    """Returns the rising upper edges of all classes but the last.

    Half of the classes lie on either side of `margin`; each side is cut into quantiles. Exact
    zeros, where both models wrote the same, are no evidence of how bad a loss is and stay in the
    class next to the margin.

    >>> class_edges([-0.4, -0.2, 0.0, 0.0, 0.2, 0.6], 4, 0.0)
    (-0.3, 0.0, 0.4)

    Raises:
        DatasetInvalid: a side has too few distinct values to be cut.
    """
    half = class_count // 2
    places = [part / half for part in range(1, half)]
    below = [gap for gap in gaps if gap <= margin and gap != 0.0]
    above = [gap for gap in gaps if gap > margin]
    if half > 1 and min(len(set(below)), len(set(above))) < half:
        raise DatasetInvalid(
            f"label.class_count: {class_count} classes need {half} distinct advantages on either "
            f"side of {margin:g}, got {len(set(below))} and {len(set(above))}; ask for fewer "
            "classes or collect more rows"
        )
    lower = [float(np.quantile(below, place)) for place in places] if half > 1 else []
    upper = [float(np.quantile(above, place)) for place in places] if half > 1 else []
    return tuple(round(edge, 12) for edge in (*lower, margin, *upper))


def class_of(gap: float, edges: Sequence[float]) -> int:
    """Returns the class of an advantage; one on an edge belongs below it, as ties do.

    >>> [class_of(gap, (-0.3, 0.0, 0.4)) for gap in (-0.5, 0.0, 0.2, 0.9)]
    [0, 1, 2, 3]
    """
    return bisect_left(edges, gap)


def split_of(question_id: str, validation_share: float, test_share: float, seed: int) -> Split:
    """Returns what a question is for; all its rows share that, for seed and id alone decide.

    >>> split_of("a", 0.0, 1.0, 0)
    <Split.TEST: 'test'>
    """
    digest = hashlib.sha256(f"{seed}\0{question_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_share:
        return Split.TEST
    return Split.VALIDATION if place < test_share + validation_share else Split.TRAINING


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows in the order of their questions, each prefix and draft step once."""
    seen = set()
    kept = []
    for row in sorted(rows, key=lambda r: (r.question_id, r.request_id, r.step_index)):
        key = (row.problem, row.history, row.draft_text)
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def balanced(rows: Sequence[Row], margin: float, seed: int) -> list[Row]:
    """Returns as many rows of either label: the majority is drawn at random, by the seed.

    Raises:
        DatasetInvalid: all labels are equal.
    """
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[binary_label(row.advantage, margin)].append(row)
    if not all(sides):
        raise DatasetInvalid(
            f"label.margin: all {len(rows)} training rows have label {int(bool(sides[1]))}; "
            "collect more questions, change the margin, or look at the models: they may not differ"
        )
    rng = random.Random(seed)  # noqa: S311 - a reproducible draw
    count = min(map(len, sides))
    drawn = [row for side in sides for row in rng.sample(side, count)]
    rng.shuffle(drawn)
    return drawn


def prior_logit_shift(rows: Sequence[Row], margin: float) -> float:
    """Returns what balancing took from the logit of a positive: ln(p / (1 - p)).

    A score of a model trained on balanced rows, its logit shifted by this, is the probability
    among rows as they come.

    Raises:
        DatasetInvalid: all labels are equal.
    """
    positive = sum(binary_label(row.advantage, margin) for row in rows)
    if positive in {0, len(rows)}:
        raise DatasetInvalid(f"label.margin: all {len(rows)} rows have one label; change it")
    return float(np.log(positive / (len(rows) - positive)))
