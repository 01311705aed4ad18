"""Labels, balances and splits what was collected: from rows to what a router is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from router_training.config import Label
from router_training.errors import DatasetInvalid
from router_training.label import (
    Split,
    balanced,
    binary_label,
    class_edges,
    distinct,
    prior_logit_shift,
    split_of,
)
from router_training.rows import Row, rows_digest


@dataclass(frozen=True, slots=True)
class Dataset:
    """Three splits by question, and how advantages become classes.

    Only the training rows may be balanced. `edges` are the upper edges of all classes but the
    last; `logit_shift` undoes the balancing in a score's logit, 0 where there was none.
    """

    training: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    edges: tuple[float, ...]
    logit_shift: float
    positive_share: float

    def summary(self) -> dict[str, Any]:
        """Returns counts and digests for the stage's stamp."""
        return {
            "digest": rows_digest([*self.training, *self.validation, *self.test]),
            "training_digest": rows_digest(self.training),
            "row_counts": {split.value: len(getattr(self, split.value)) for split in Split},
            "edges": list(self.edges),
            "logit_shift": self.logit_shift,
            "positive_share": round(self.positive_share, 4),
        }


def make_dataset(collected: Sequence[Row], settings: Label) -> Dataset:
    """Returns the dataset of the collected rows; equal rows and settings give an equal one.

    Raises:
        DatasetInvalid: rows of two models in a role, an empty split, or labels all equal.
    """
    rows = distinct(collected)
    _check_one_of_each(rows)
    splits: dict[Split, list[Row]] = {split: [] for split in Split}
    for row in rows:
        split = split_of(
            row.question_id, settings.validation_share, settings.test_share, settings.seed
        )
        splits[split].append(row)
    for split, some in splits.items():
        if not some:
            raise DatasetInvalid(
                f"label: the {split.value} split of {len(rows)} rows is empty; collect more "
                "questions, or raise label.validation_share or label.test_share"
            )
    natural = splits[Split.TRAINING]
    shift = prior_logit_shift(natural, settings.margin)
    training = balanced(natural, settings.margin, settings.seed) if settings.balanced else natural
    edges = class_edges([row.advantage for row in training], settings.class_count, settings.margin)
    return Dataset(
        tuple(training),
        tuple(splits[Split.VALIDATION]),
        tuple(splits[Split.TEST]),
        edges,
        shift if settings.balanced else 0.0,
        sum(binary_label(row.advantage, settings.margin) for row in natural) / len(natural),
    )


def _check_one_of_each(rows: Sequence[Row]) -> None:
    # No advantage mixes two PRMs, and a router belongs to one draft and one target.
    for role in ("prm", "draft", "target"):
        models = {getattr(row, role) for row in rows}
        if len(models) > 1:
            listed = ", ".join(sorted(f"{m.model_id}@{m.revision}" for m in models))
            raise DatasetInvalid(
                f"rows: they come from {len(models)} models as {role} ({listed}), which cannot be "
                "mixed; keep the parts of one"
            )
