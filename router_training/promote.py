"""Makes a router the serving one, unless it spends the target's compute worse than that one."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from router_training.config import Evaluate
from router_training.errors import DatasetInvalid, PromotionRefused, StorageFailed
from router_training.metrics import Floats, budget_area, paired_bootstrap
from router_training.rows import Row
from router_training.scoring import judged, router_scores
from services.engines.revisions import (
    LocationUnreachable,
    RevisionError,
    RevisionStore,
    revision_of,
)

_log = logging.getLogger(__name__)


def promote(
    checkpoint: Path,
    rows: Sequence[Row],
    location: str,
    *,
    margin: float,
    settings: Evaluate,
    dry_run: bool = False,
) -> str | None:
    """Writes `checkpoint` to `location` and makes it current; returns its revision.

    It is refused where its area under the budget curve on `rows` is below that of the serving
    router by more than the 95 % interval of the difference; where nothing serves yet, or what
    should is damaged, that of a coin. With `dry_run` the decision is told and nothing is changed
    (None).

    Raises:
        PromotionRefused: with the figures.
        DatasetInvalid, StorageFailed
    """
    store = _store(location)
    try:
        serving = store.current()
        if serving is not None and revision_of(checkpoint) == serving:
            _log.info("promote: %s serves revision %s already", location, serving)
            # Adding it again mends what was damaged.
            return None if dry_run else store.add(checkpoint)
        known = None if serving is None else _scores_of(serving, store, rows)
    except LocationUnreachable as error:
        raise StorageFailed(str(error)) from None
    except RevisionError as error:
        raise DatasetInvalid(str(error)) from None
    new = judged(rows, router_scores(checkpoint, rows), margin)
    old = new.by(np.zeros(len(rows)) if known is None else known)
    gain = paired_bootstrap(new, old, budget_area, settings.seed, settings.rounds)
    against = "a coin (nothing serves)" if known is None else f"the serving router {serving}"
    figures = (
        f"mean reward under the budget curve, new minus {against}: {gain.value:+.5f} "
        f"[{gain.low:+.5f}, {gain.high:+.5f}] on {len(rows)} test steps"
    )
    if gain.high < 0.0 or (known is None and gain.low <= 0.0):
        raise PromotionRefused(
            f"{figures}; look at the report, collect more or other rows, and train again"
        )
    _log.info("promote: %s", figures)
    if dry_run:
        _log.info("promote: dry run, nothing is changed")
        return None
    note = {"budget_area_gain": gain.to_json(), "against": serving, **_told(checkpoint)}
    try:
        revision = store.add(checkpoint)
        store.point_to(revision, note)
    except RevisionError as error:
        raise StorageFailed(str(error)) from None
    _log.info("promote: %s serves revision %s", location, revision)
    return revision


def rollback(location: str) -> str:
    """Makes the router before the serving one serve again; returns its revision.

    Raises:
        DatasetInvalid: there is none.
    """
    try:
        revision = _store(location).rollback()
    except RevisionError as error:
        raise DatasetInvalid(str(error)) from None
    _log.info("rollback: %s serves revision %s", location, revision)
    return revision


def _scores_of(serving: str, store: RevisionStore, rows: Sequence[Row]) -> Floats | None:
    """Returns the serving router's scores [rows]; None where it is damaged.

    Raises:
        LocationUnreachable
    """
    with tempfile.TemporaryDirectory(prefix="arbitrage-serving-") as folder:
        try:
            return router_scores(store.fetch(serving, Path(folder)), rows)
        except LocationUnreachable:
            raise
        except RevisionError as error:
            # What cannot serve must not keep others from it.
            _log.warning("promote: %s", error)
            return None


def _store(location: str) -> RevisionStore:
    try:
        return RevisionStore(location)
    except RevisionError as error:
        raise DatasetInvalid(f"promote.location: {error}") from None


def _told(checkpoint: Path) -> dict[str, Any]:
    fields = json.loads((checkpoint / "router.json").read_text(encoding="utf-8"))
    return {name: fields[name] for name in ("training_data_digest", "metrics", "default_threshold")}
