"""The ablation's table, and the larger miniature at a size for this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ablation import QUICK_VARIANTS, VARIANTS, order_claims, summary
from benchmarks.gpu.larger_miniature import SMALL, build
from router_training.config import read_config
from services.engines.loading import ModelKind, load_model
from services.engines.packs import find_pack, verify_pack

ROOT = Path(__file__).resolve().parents[2]


def runs(rho: dict[str, float]) -> list[dict[str, object]]:
    """Returns five seeds' runs of every variant around a mean."""
    return [
        {
            "variant": variant.name,
            "seed": seed,
            "rho": rho.get(variant.name, 0.1) + seed / 100,
            **dict.fromkeys(("label_0_accuracy", "label_1_accuracy", "balanced_accuracy"), 0.5),
        }
        for variant in VARIANTS
        for seed in range(5)
    ]


def test_a_difference_is_paired_over_seeds() -> None:
    claims = order_claims(runs({"2-class, annotated": 0.3}))
    first = claims[0].as_json()
    assert first["value"] == pytest.approx(0.2)
    # The seeds vary alike in both variants, so the difference does not vary at all.
    assert first["interval"] == pytest.approx([0.2, 0.2])
    assert first["holds"]
    assert not order_claims(runs({}))[0].as_json()["holds"]


def test_a_row_of_the_table_is_the_mean_and_spread_over_seeds() -> None:
    row = summary(runs({}), VARIANTS)[0]
    assert (row["rho"], row["rho_sd"], row["seeds"]) == (0.12, 0.0158, 5)
    assert row["published_rho"] == 0.1508


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_quick_ablation_trains_and_measures_every_variant(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.ablation", "--quick"]
    result = tmp_path / "ablation.json"
    done = subprocess.run(
        [*command, "--set", f"work={tmp_path / 'work'}", "--json", str(result)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text())["rows"]
    assert [row["variant"] for row in rows] == [variant.name for variant in QUICK_VARIANTS]
    assert all(-1.0 <= row["rho"] <= 1.0 for row in rows)
    assert len({row["rho"] for row in rows}) > 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_larger_miniature_is_built_into_a_pack_that_loads(tmp_path: Path) -> None:
    folder = build(SMALL, tmp_path, "cpu")
    pack = find_pack(str(folder))
    assert verify_pack(pack) == ()
    load_model(str(pack.model_reference("draft")), ModelKind.CAUSAL_LM)
    load_model(str(pack.model_reference("prm")), ModelKind.TOKEN_CLASSIFICATION)
    load_model(str(pack.model_reference("router")), ModelKind.SEQUENCE_CLASSIFICATION)
    assert read_config(tmp_path / "router.toml").services.pack == str(folder)
    assert len((folder / "questions.jsonl").read_text().splitlines()) == SMALL.question_count
