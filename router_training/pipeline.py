"""The stages in their order, each made from the outputs of the ones before."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arbitrage.core.calibration import CalibrationTable
from router_training.calibrate import calibration_table, significant, threshold_grid
from router_training.collect import collect
from router_training.config import RunConfig
from router_training.connections import connected
from router_training.dataset import make_dataset
from router_training.errors import ConfigInvalid, DatasetInvalid
from router_training.evaluate import Trained, measure, router_json, write_checkpoint
from router_training.feedback import rows_from_feedback
from router_training.label import Split
from router_training.promote import promote, rollback
from router_training.questions import Columns, Question, read_questions, sample, shard
from router_training.report import write_report
from router_training.rows import Row, RowFolder, read_rows, rows_digest, write_rows
from router_training.scoring import judged, loaded_router, router_scores
from router_training.stages import Stamps, digest, is_first_process, write_atomically
from router_training.train import score_rule, train
from services.engines.pack_manifest import PackError
from services.engines.packs import find_pack

_log = logging.getLogger(__name__)


class Pipeline:
    """One run's stages and the work folder where their outputs lie.

    rows/        what was collected, append-only
    dataset/     the splits, as drawn and labelled
    train/       checkpoints; model/ is the trained router
    evaluate/    report.json, report.md, plots; checkpoint/ is what is promoted
    """

    def __init__(self, config: RunConfig, *, force: bool = False) -> None:
        self._config = config
        self._work = config.work
        self._stamps = Stamps(config.work, force=force)

    def run(self, *, dry_run: bool = False) -> None:
        """Runs every stage that is not current."""
        self.collect()
        self.label()
        self.train()
        self.evaluate()
        self.promote(dry_run=dry_run)

    def collect(self, part: tuple[int, int] = (0, 1), feedback: str | None = None) -> None:
        """Walks part K of N of the questions; or takes production records for rows.

        Each part has a stamp of its own, so that several jobs may write to one folder.
        """
        config, folder = self._config, RowFolder(self._work / "rows", part)
        if feedback is not None:
            _log.info("collect: %d rows from feedback", rows_from_feedback(feedback, folder))
            return
        made_from = digest(
            config.questions.model_dump(), config.collect.model_dump(), _who(config), part
        )
        stage = "collect" if part == (0, 1) else f"collect-{part[0]}-of-{part[1]}"

        def work() -> dict[str, Any]:
            asyncio.run(self._collect(shard(self._questions(), *part), folder))
            return {}

        self._stamps.run(stage, made_from, work)

    async def _collect(self, questions: Sequence[Question], folder: RowFolder) -> None:
        async with connected(self._config.services) as connection:
            await collect(questions, self._config.collect, connection, folder)

    def label(self) -> dict[str, Any]:
        """Draws the splits from what was collected."""
        settings = self._config.label
        rows = list(RowFolder(self._work / "rows").read())
        if not rows:
            raise DatasetInvalid(f"{self._work / 'rows'}: there are no rows; run collect first")

        def work() -> dict[str, Any]:
            dataset = make_dataset(rows, settings)
            for split in Split:
                write_rows(self._split_path(split), getattr(dataset, split.value))
            return dataset.summary()

        return self._stamps.run("label", digest(settings.model_dump(), rows_digest(rows)), work)

    def train(self) -> dict[str, Any]:
        """Trains the router."""
        known, settings = self._stamps.outputs("label"), self._config.train
        kind = self._config.label.kind
        made_from = digest(settings.model_dump(), kind, known["edges"], known["digest"])
        folder = self._work / "train"

        def work() -> dict[str, Any]:
            _start_afresh_unless_made_from(folder, made_from)
            splits = self._rows(Split.TRAINING), self._rows(Split.VALIDATION)
            rule = score_rule(kind, len(known["edges"]) + 1)
            return train(splits, known["edges"], rule, settings, folder)

        outputs = self._stamps.run("train", made_from, work)
        return {**outputs, "made_from": made_from}

    def evaluate(self) -> dict[str, Any]:
        """Measures the router, tabulates thresholds, and makes the checkpoint to promote."""
        config = self._config
        known = self._stamps.outputs("label")
        trained_from = self._stamps.made_from("train")
        made_from = digest(config.evaluate.model_dump(), known["digest"], trained_from)
        return self._stamps.run("evaluate", made_from, lambda: self._evaluate(known))

    def promote(self, *, dry_run: bool = False) -> None:
        """Makes the checkpoint the serving one, unless its budget curve is lower."""
        self._stamps.outputs("evaluate")
        promote(
            self._work / "evaluate" / "checkpoint",
            self._rows(Split.TEST),
            self._config.promote.location,
            margin=self._config.label.margin,
            settings=self._config.evaluate,
            dry_run=dry_run,
        )

    def rollback(self) -> None:
        """Makes the router before the serving one serve again."""
        rollback(self._config.promote.location)

    def _evaluate(self, known: dict[str, Any]) -> dict[str, Any]:
        config, folder = self._config, self._work / "evaluate"
        label, settings = config.label, config.evaluate
        trained = Trained(
            annotated=config.train.annotated,
            rule=score_rule(label.kind, label.class_count),
            class_count=label.class_count,
            margin=label.margin,
            logit_shift=known["logit_shift"],
            data_digest=known["training_digest"],
            base=config.train.init,
        )
        model, checkpoint = self._work / "train" / "model", folder / "checkpoint"
        write_checkpoint(model, router_json(trained, CalibrationTable((), ()), 0.5, {}), checkpoint)
        rows = self._rows(Split.TEST)
        scores = router_scores(checkpoint, rows, config.train.threads)
        unseen = [*rows, *self._rows(Split.VALIDATION)]
        problems = list(dict.fromkeys(row.problem for row in unseen))
        asked = problems[: settings.calibration_questions]
        table = asyncio.run(self._calibrate(asked, checkpoint, threshold_grid(scores)))
        threshold = significant(table.threshold_for(settings.default_target_share))
        test = judged(rows, scores, label.margin)
        report = measure(rows, test, trained.logit_shift, threshold, settings)
        report |= _provenance(rows[0], label.margin, trained)
        report["calibration"] = router_json(trained, table, threshold, {})["calibration"]
        report["calibration_question_count"] = len(asked)
        summary = {name: report["metrics"][name] for name in ("spearman", "budget_area")}
        write_checkpoint(model, router_json(trained, table, threshold, summary), checkpoint)
        write_report(folder, report, test, trained.logit_shift)
        return {"threshold": threshold, "metrics": report["metrics"]}

    async def _calibrate(
        self, problems: Sequence[str], checkpoint: Path, thresholds: Sequence[float]
    ) -> CalibrationTable:
        config = self._config
        async with (
            connected(config.services) as connection,
            loaded_router(checkpoint, config.train.threads) as router,
        ):
            return await calibration_table(
                problems, connection.models, router, thresholds, config.collect
            )

    def _split_path(self, split: Split) -> Path:
        return self._work / "dataset" / f"{split.value}.parquet"

    def _rows(self, split: Split) -> list[Row]:
        return read_rows(self._split_path(split))

    def _questions(self) -> list[Question]:
        asked = self._config.questions
        columns = Columns(asked.problem_column, asked.stratify_by)
        found = read_questions(asked.source, columns, split=asked.split, revision=asked.revision)
        return sample(found, asked.count, asked.seed)


def _who(config: RunConfig) -> dict[str, str]:
    """Returns what stands for the models that rows depend on, without starting them.

    Addresses say nothing of what answers there; rows of other models are refused when it is asked.
    """
    services = config.services
    if services.pack is None:
        return {role: str(getattr(services, role)) for role in ("draft", "target", "prm")}
    try:
        pack = find_pack(services.pack)
        roles = {role: pack.models[role].path for role in ("draft", "target", "prm")}
    except PackError as error:
        raise ConfigInvalid(f"services.pack: {error}") from None
    return {
        role: digest([(f.path, f.sha256) for f in pack.files if f.path.startswith(f"{path}/")])
        for role, path in roles.items()
    }


def _provenance(row: Row, margin: float, trained: Trained) -> dict[str, Any]:
    return {
        "margin": margin,
        "models": {
            role: f"{getattr(row, role).model_id}@{getattr(row, role).revision}"
            for role in ("prm", "draft", "target")
        },
        "training_data_digest": trained.data_digest,
        "logit_shift": round(trained.logit_shift, 6),
    }


def _start_afresh_unless_made_from(folder: Path, made_from: str) -> None:
    # Checkpoints of other data or settings must not be gone on from.
    mark = folder / "made_from"
    if not is_first_process():
        return
    if not mark.is_file() or mark.read_text() != made_from:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(mark, made_from)
