"""Which choices in a router's training matter? The table of the method's published ablation.

`python -m benchmarks.ablation --json FILE` trains a router for every variant and seed on rows of
the tiny pack (collected first, where they are not there yet) and measures it on test questions
that none of them saw. Every variant trains on equally many rows for equally many steps.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from arbitrage.core.calibration import CalibrationTable
from benchmarks.results import ROOT, Bar, Claim, Result, table
from router_training.config import RunConfig, parsed_overrides, read_config
from router_training.dataset import make_dataset
from router_training.errors import TrainingError
from router_training.evaluate import Trained, router_json, write_checkpoint
from router_training.metrics import balanced_accuracy, label_accuracy, spearman
from router_training.pipeline import Pipeline
from router_training.rows import Row, RowFolder
from router_training.scoring import judged, router_scores
from router_training.train import score_rule, train

CONFIG = ROOT / "router_training" / "configs" / "tiny.toml"
THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table: what differs from the base, and what was published for it."""

    name: str
    published_rho: float
    label: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("2-class, annotated", 0.1508, train={"annotated": True}),
    Variant("2-class, plain", 0.1305, train={"annotated": False}),
    Variant(
        "4-class, annotated",
        0.1417,
        {"kind": "quantile", "class_count": 4},
        {"annotated": True},
    ),
    Variant(
        "4-class ordinal, annotated",
        0.1355,
        {"kind": "ordinal", "class_count": 4},
        {"annotated": True},
    ),
    Variant(
        "10-class, annotated",
        0.1337,
        {"kind": "quantile", "class_count": 10},
        {"annotated": True},
    ),
    Variant("2-class, annotated, not balanced", 0.1587, {"balanced": False}, {"annotated": True}),
)
# Ten classes need five distinct losses, which few rows do not have.
QUICK_VARIANTS = tuple(v for v in VARIANTS if v.label.get("class_count", 2) <= 4)
# Published pairs whose order is compared: (better, worse). Balancing is from another run there.
PUBLISHED_ORDER = (
    ("2-class, annotated", "2-class, plain"),
    ("2-class, annotated", "4-class, annotated"),
    ("2-class, annotated", "4-class ordinal, annotated"),
    ("2-class, annotated", "10-class, annotated"),
    ("2-class, annotated", "2-class, annotated, not balanced"),
)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is trained and measured."""

    seeds: int
    training_rows: int
    validation_rows: int
    test_rows: int


FULL = Effort(5, 2400, 480, 2400)
QUICK = Effort(1, 72, 48, 120)


def measured(
    variant: Variant, seed: int, config: RunConfig, rows_folder: Path, effort: Effort
) -> dict[str, Any]:
    """Trains one variant with one seed and returns its figures on the test rows."""
    label = config.label.model_copy(update={**variant.label, "seed": config.label.seed})
    settings = config.train.model_copy(
        update={**variant.train, "seed": seed, "epochs": 1.0, "evaluations": 1, "threads": 1}
    )
    dataset = make_dataset(_rows(rows_folder), label)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(dataset.training))[: effort.training_rows]
    training = [dataset.training[i] for i in chosen]
    rule = score_rule(label.kind, label.class_count)
    with tempfile.TemporaryDirectory(prefix="arbitrage-ablation-") as temporary:
        folder = Path(temporary)
        splits = training, dataset.validation[: effort.validation_rows]
        train(splits, dataset.edges, rule, settings, folder)
        known = Trained(
            settings.annotated, rule, label.class_count, label.margin, 0.0, "", settings.init
        )
        metadata = router_json(known, CalibrationTable((), ()), THRESHOLD, {})
        write_checkpoint(folder / "model", metadata, folder / "checkpoint")
        test = dataset.test[: effort.test_rows]
        scores = router_scores(folder / "checkpoint", test, threads=1)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    found = judged(test, scores, label.margin)
    return {
        "variant": variant.name,
        "seed": seed,
        "rho": spearman(found.scores, found.advantages),
        "label_0_accuracy": label_accuracy(found, False, THRESHOLD),
        "label_1_accuracy": label_accuracy(found, True, THRESHOLD),
        "balanced_accuracy": balanced_accuracy(found, THRESHOLD),
        "training_rows": len(training),
        "test_rows": len(test),
    }


@lru_cache(maxsize=1)
def _rows(folder: Path) -> list[Row]:
    return list(RowFolder(folder).read())


def every_run(
    variants: Sequence[Variant], config: RunConfig, effort: Effort, processes: int
) -> Iterator[dict[str, Any]]:
    """Yields the figures of every variant and seed, several at a time."""
    rows_folder = config.work / "rows"
    runs = [(variant, seed) for seed in range(effort.seeds) for variant in variants]
    # A forked process would share locks of torch's threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(measured, variant, seed, config, rows_folder, effort)
            for variant, seed in runs
        ]
        started_s = time.monotonic()
        for number, future in enumerate(futures, start=1):
            found = future.result()
            took_s = time.monotonic() - started_s
            print(
                f"{number}/{len(runs)} {found['variant']} seed {found['seed']}: "
                f"ρ {found['rho']:.4f} ({took_s:.0f} s, "
                f"{took_s / number * (len(runs) - number):.0f}"
                " s left)",
                flush=True,
            )
            yield found


def summary(runs: Sequence[dict[str, Any]], variants: Sequence[Variant]) -> list[dict[str, object]]:
    """Returns a row per variant: the mean and standard deviation over seeds of each figure."""
    found: list[dict[str, object]] = []
    for variant in variants:
        own = [run for run in runs if run["variant"] == variant.name]
        row: dict[str, object] = {"variant": variant.name, "seeds": len(own)}
        for name in ("rho", "label_0_accuracy", "label_1_accuracy", "balanced_accuracy"):
            values = [run[name] for run in own]
            row[name] = round(float(np.mean(values)), 4)
            row[f"{name}_sd"] = round(float(np.std(values, ddof=len(values) > 1)), 4)
        row["published_rho"] = variant.published_rho
        found.append(row)
    return found


def order_claims(runs: Sequence[dict[str, Any]]) -> tuple[Claim, ...]:
    """Returns, for each published order, the paired difference of ρ over seeds."""
    claims = []
    seen = {run["variant"] for run in runs}
    for better, worse in PUBLISHED_ORDER:
        if not {better, worse} <= seen:
            continue
        gaps = np.array(
            [
                a["rho"] - b["rho"]
                for a in runs
                for b in runs
                if a["variant"] == better and b["variant"] == worse and a["seed"] == b["seed"]
            ]
        )
        spread = 2.776 * gaps.std(ddof=1) / len(gaps) ** 0.5 if len(gaps) == FULL.seeds else np.nan
        mean = float(gaps.mean())
        claims.append(
            Claim(
                f"ρ of {better} above {worse}, as published",
                mean,
                "",
                "paired over seeds; interval by Student's t",
                len(gaps),
                Bar("above", 0.0),
                None if np.isnan(spread) else (mean - float(spread), mean + float(spread)),
            )
        )
    return tuple(claims)


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--config", type=Path, default=CONFIG, help="a router_training config")
    parser.add_argument(
        *("--set",), action="append", default=[], metavar="KEY=VALUE", help="replaces a value"
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at once, a core each")
    parser.add_argument("--quick", action="store_true", help="one seed on very few rows")
    asked = parser.parse_args()
    effort = QUICK if asked.quick else FULL
    try:
        overrides = {"work": "build/router/quick", "questions.count": 160} if asked.quick else {}
        config = read_config(asked.config, {**overrides, **parsed_overrides(asked.set)})
        Pipeline(config).collect()
        variants = QUICK_VARIANTS if asked.quick else VARIANTS
        runs = list(every_run(variants, config, effort, asked.processes))
    except TrainingError as error:
        sys.stderr.write(f"ablation: {error}\n")
        return 2
    rows = summary(runs, variants)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    result = Result("ablation", tuple(range(effort.seeds)), order_claims(runs), rows=tuple(rows))
    result.print_claims()
    if asked.json:
        result.write(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
