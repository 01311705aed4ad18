"""Turns production records into rows: what `collect --from-feedback` does."""

from __future__ import annotations

from pathlib import Path

from router_training.rows import RowFolder


def rows_from_feedback(feedback: Path, folder: RowFolder) -> int:
    raise NotImplementedError
