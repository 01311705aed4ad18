"""The whole run on the shipped models: current stages are skipped, kills lose nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arbitrage.core.calibration import CalibrationTable
from router_training.__main__ import main
from router_training.config import Evaluate, read_config
from router_training.errors import PromotionRefused
from router_training.evaluate import Trained, router_json, write_checkpoint
from router_training.label import balanced
from router_training.promote import promote
from router_training.rows import Row, RowFolder
from router_training.train import score_rule, train
from services.engines.revisions import RevisionStore
from services.engines.router_format import read_router_format

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "router_training" / "configs" / "tiny.toml"
SETTINGS = (
    "questions.count=48",
    "collect.questions_per_part=8",
    "label.validation_share=0.25",
    "label.test_share=0.25",
    "train.epochs=2.0",
    "train.batch_rows=8",
    "train.evaluations=3",
    "train.threads=1",
    "evaluate.rounds=100",
    "evaluate.calibration_questions=6",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def arguments(work: Path, command: str, *settings: str) -> list[str]:
    """Returns the command line of a small run in `work`."""
    pairs = (*SETTINGS, f"work={work}", f"promote.location={work / 'serving'}", *settings)
    return [command, "--config", str(CONFIG), *(a for pair in pairs for a in ("--set", pair))]


def run(work: Path, command: str = "run", *settings: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "router_training", *arguments(work, command, *settings)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def killed_when(work: Path, reached: Callable[[], object]) -> None:
    """Starts a run and kills it, and nothing else, once it has come so far."""
    process = subprocess.Popen(
        [sys.executable, "-m", "router_training", *arguments(work, "run")],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline_s = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, "the run ended before it came so far"
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def outputs(work: Path, stage: str) -> dict[str, object]:
    """Returns what a stage says of its outputs."""
    found: dict[str, object] = json.loads((work / f"{stage}.stamp.json").read_text())["outputs"]
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("work")
    found = run(folder)
    assert found.returncode == 0, found.stderr
    return folder


def rows_of(work: Path) -> list[Row]:
    """Returns all that was collected."""
    return list(RowFolder(work / "rows").read())


def test_a_run_ends_with_a_router_that_the_service_can_read(work: Path) -> None:
    store = RevisionStore(str(work / "serving"))
    revision = store.current()
    assert revision is not None
    folder = store.fetch(revision, work)
    known = read_router_format(folder / "router.json")
    assert known.is_annotated is False
    assert known.prior_logit_shift < 0
    assert known.calibration.target_shares[0] == pytest.approx(1.0)
    assert known.calibration.target_shares[-1] == 0.0
    assert known.calibration.threshold_for(0.45) == pytest.approx(known.default_threshold, rel=1e-4)


def test_the_report_has_every_figure_with_an_interval(work: Path) -> None:
    report = json.loads((work / "evaluate" / "report.json").read_text())
    assert {"spearman", "balanced_accuracy", "area_under_roc"} < report["metrics"].keys()
    for estimate in report["metrics"].values():
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    curve = report["budget_curve"]
    assert curve["router"][-1] == pytest.approx(curve["oracle"][-1], abs=1e-4)
    assert max(np.array(curve["router"]) - np.array(curve["oracle"])) < 1e-4
    text = (work / "evaluate" / "report.md").read_text()
    assert "rsd" in text
    assert (work / "evaluate" / "budget_curve.png").stat().st_size > 10_000


def test_a_second_run_does_nothing_again(work: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    found = run(work)
    assert found.returncode == 0, found.stderr
    assert [line for line in found.stderr.splitlines() if "running" in line] == []
    after = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert after == before


def test_a_changed_setting_reruns_its_stage_and_those_after_it(work: Path, tmp_path: Path) -> None:
    copy = tmp_path / "work"
    shutil.copytree(work, copy)
    found = run(copy, "label", "label.seed=7")
    assert "label: running" in found.stderr
    assert outputs(copy, "label")["digest"] != outputs(work, "label")["digest"]


def test_a_kill_in_each_stage_changes_nothing_in_the_end(work: Path, tmp_path: Path) -> None:
    killed = tmp_path / "work"
    rows, train_folder = killed / "rows", killed / "train"
    killed_when(killed, lambda: len(list(rows.glob("part-*.parquet"))) >= 2)
    assert not (killed / "collect.stamp.json").exists()
    killed_when(killed, lambda: (killed / "dataset" / "training.parquet").exists())
    killed_when(killed, lambda: list(train_folder.glob("checkpoints/checkpoint-*")))
    killed_when(killed, lambda: (killed / "evaluate" / "checkpoint").exists())
    killed_when(killed, lambda: (killed / "serving" / "revisions").exists())
    found = run(killed)
    assert found.returncode == 0, found.stderr
    names = [(row.request_id, row.step_index) for row in rows_of(killed)]
    assert len(set(names)) == len(names)
    assert sorted(names) == sorted((row.request_id, row.step_index) for row in rows_of(work))
    assert outputs(killed, "label")["digest"] == outputs(work, "label")["digest"]
    for name, estimate in outputs(work, "evaluate")["metrics"].items():  # type: ignore[attr-defined]  # JSON
        again = outputs(killed, "evaluate")["metrics"][name]  # type: ignore[index]  # JSON
        assert again == pytest.approx(estimate, abs=2e-3), name
    assert RevisionStore(str(killed / "serving")).current() is not None


def test_a_router_of_shuffled_labels_is_refused_with_the_figures(
    work: Path, tmp_path: Path
) -> None:
    config = read_config(CONFIG)
    rows = rows_of(work)
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = [
        replace(
            row,
            draft_score=rows[i].draft_score,
            target_scores=rows[i].target_scores,
            advantage=rows[i].advantage,
            label=rows[i].label,
        )
        for row, i in zip(rows, order, strict=True)
    ]
    rule = score_rule("softmax", 2)
    changes = {"epochs": 6.0, "batch_rows": 8, "evaluations": 1, "learning_rate": 3e-4}
    settings = config.train.model_copy(update={**changes, "threads": 1})
    train((balanced(shuffled, 0.0, 1), shuffled), (0.0,), rule, settings, tmp_path / "train")
    trained = Trained(False, rule, 2, 0.0, 0.0, "shuffled", settings.init)
    bare = router_json(trained, CalibrationTable((), ()), 0.5, {})
    write_checkpoint(tmp_path / "train" / "model", bare, tmp_path / "checkpoint")
    place = work / "serving"
    before = RevisionStore(str(place)).history()
    with pytest.raises(PromotionRefused, match=r"new minus the serving router .*: -0\.\d+ \["):
        promote(
            tmp_path / "checkpoint", rows, str(place), margin=0.0, settings=Evaluate(rounds=200)
        )
    assert RevisionStore(str(place)).history() == before


def test_a_dry_run_decides_and_changes_nothing(work: Path, tmp_path: Path) -> None:
    copy = tmp_path / "work"
    shutil.copytree(work, copy, ignore=shutil.ignore_patterns("serving"))
    assert main([*arguments(copy, "promote"), "--dry-run"]) == 0
    assert not (copy / "serving").exists()
    assert main(arguments(copy, "promote")) == 0
    assert len(RevisionStore(str(copy / "serving")).history()) == 1
    assert main(arguments(copy, "rollback")) == 2
    # What serves is damaged: promoting the same router again mends it, with no new entry.
    (weights,) = (copy / "serving").glob("revisions/*/model.safetensors")
    weights.write_bytes(b"other")
    assert main(arguments(copy, "promote")) == 0
    store = RevisionStore(str(copy / "serving"))
    (promotion,) = store.history()
    assert store.fetch(promotion.revision, tmp_path).is_dir()
    # And another may take the place of one that is damaged.
    weights.write_bytes(b"other")
    described = copy / "evaluate" / "checkpoint" / "router.json"
    described.write_text(described.read_text() + " ")
    assert main(arguments(copy, "promote")) == 0
    assert len(store.history()) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("questions.problem_column=text",), "no column 'text' (questions.problem_column)"),
        (("train.init=nowhere",), "train.init: 'nowhere' is no folder"),
        (("train.frozen_layers=40",), "train.frozen_layers: 40 asked for"),
        (("train.learnin_rate=1",), "train.learnin_rate: there is no such key"),
        (("label.margin=0.99",), "label.margin: all"),
        (("label.test_share=0.001", "label.validation_share=0.001"), "split"),
    ],
)
def test_bad_input_is_one_clear_line_and_earlier_rows_stay(
    work: Path,
    tmp_path: Path,
    settings: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "work"
    shutil.copytree(work, copy)
    stage = "collect" if settings[0].startswith("questions") else "label"
    if settings[0].startswith("train"):
        stage = "train"
    assert main(arguments(copy, stage, *settings)) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert rows_of(copy) == rows_of(work)


def test_services_that_are_not_there_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f"""
work = "{tmp_path}"
[services]
draft = "127.0.0.1:1"
target = "127.0.0.1:1"
prm = "127.0.0.1:1"
[questions]
source = "{ROOT}/model_packs/tiny/questions.jsonl"
count = 2
[train]
init = "tiny/prm"
[promote]
location = "{tmp_path}/serving"
"""
    )
    assert main(["collect", "--config", str(config)]) == 2
    assert "draft 127.0.0.1:1" in capsys.readouterr().err
