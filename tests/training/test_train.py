"""Training on small random models: every kind of head, adapters, and what must not change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from arbitrage.core.calibration import CalibrationTable
from router_training.config import Lora, Train
from router_training.errors import ConfigInvalid
from router_training.evaluate import Trained, router_json, write_checkpoint
from router_training.label import class_edges
from router_training.model import initial_model
from router_training.rows import Row
from router_training.scoring import router_scores
from router_training.train import score_rule, train
from services.engines.loading import ModelKind, load_model
from services.engines.transformers_scorers import TransformersRouter
from tests.services.engine_models import byte_tokenizer, random_encoder, random_model, save
from tests.training.rows import a_row

pytestmark = pytest.mark.slow


def rows(count: int) -> list[Row]:
    """Returns rows whose candidate tells their advantage."""
    return [
        a_row(
            problem=f"{n}?",
            draft_text="good" if n % 2 else "bad",
            draft_score=0.9 if n % 2 else 0.1 + n / 1000,
            target_scores=(0.8 - n / 1000,),
        )
        for n in range(count)
    ]


@pytest.fixture
def causal_lm(tmp_path: Path) -> Path:
    folder = tmp_path / "lm"
    random_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def reward_model(tmp_path: Path, causal_lm: Path) -> Path:
    folder = tmp_path / "prm"
    torch.manual_seed(1)
    model = AutoModelForTokenClassification.from_pretrained(causal_lm, num_labels=2)
    with torch.no_grad():
        # Structure: a dimension that no layer writes to.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def settings(init: Path, **changes: Any) -> Train:
    """Returns settings of a short training."""
    values = {"epochs": 12.0, "batch_rows": 8, "evaluations": 2, "learning_rate": 3e-3}
    return Train(init=str(init), threads=1, **{**values, **changes})


def checkpoint(folder: Path, used: Train, kind: str, class_count: int) -> Path:
    """Makes what a service reads of a trained model."""
    rule = score_rule(kind, class_count)
    trained = Trained(used.annotated, rule, class_count, 0.0, 0.0, "", used.init)
    described = router_json(trained, CalibrationTable((), ()), 0.5, {})
    write_checkpoint(folder / "model", described, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.parametrize(("kind", "class_count"), [("softmax", 2), ("quantile", 4), ("ordinal", 4)])
def test_every_kind_of_head_learns_and_serves(
    tmp_path: Path, causal_lm: Path, kind: str, class_count: int
) -> None:
    data, used = rows(64), settings(causal_lm)
    edges = class_edges([row.advantage for row in data], class_count, 0.0)
    found = train((data, data), edges, score_rule(kind, class_count), used, tmp_path)
    assert found["validation_rho"] > 0.7
    scores = router_scores(checkpoint(tmp_path, used, kind, class_count), data)
    better = scores[[bool(row.label) for row in data]]
    assert better.min() > scores[[not row.label for row in data]].max()


def test_an_encoder_learns_and_serves(tmp_path: Path) -> None:
    folder, data = tmp_path / "encoder", rows(64)
    save(folder, random_encoder(), byte_tokenizer(adds_start=True, model_max_length=512))
    rule, used = score_rule("softmax", 2), settings(folder)
    found = train((data, data), (0.0,), rule, used, tmp_path / "out")
    assert found["validation_rho"] > 0.7
    scores = router_scores(checkpoint(tmp_path / "out", used, "softmax", 2), data)
    better = scores[[bool(row.label) for row in data]]
    assert better.min() > scores[[not row.label for row in data]].max()


def test_two_processes_share_the_rows_and_train_one_model(tmp_path: Path, causal_lm: Path) -> None:
    data, used = rows(64), settings(causal_lm, batch_rows=8)
    alone = train((data, data), (0.0,), score_rule("softmax", 2), used, tmp_path / "alone")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "tests.training.together"]
    ended = subprocess.run(
        [*command, str(causal_lm), str(tmp_path / "both")],
        capture_output=True,
        text=True,
        check=True,
    )
    step_count, rho = ended.stdout.split()[-2:]
    # As many rows a step as one process with twice the batch.
    assert int(step_count) == alone["step_count"]
    assert float(rho) > 0.7
    assert (tmp_path / "both" / "model" / "model.safetensors").is_file()


def test_accumulated_batches_step_like_one_batch(tmp_path: Path, causal_lm: Path) -> None:
    data, rule = rows(32), score_rule("softmax", 2)
    norms = []
    for batch_rows, accumulation_steps in ((16, 1), (4, 4)):
        used = settings(
            causal_lm,
            batch_rows=batch_rows,
            accumulation_steps=accumulation_steps,
            epochs=0.5,
            evaluations=1,
            warmup_share=0.0,
        )
        folder = tmp_path / str(batch_rows)
        train((data, data), (0.0,), rule, used, folder)
        state = json.loads((folder / "checkpoints/checkpoint-1/trainer_state.json").read_text())
        norms.append(state["log_history"][0]["grad_norm"])
    # Other rows, so not the same; without the mean over batches it would be fourfold.
    assert norms[1] < 2 * norms[0]


def test_adapters_are_folded_into_a_stock_checkpoint(tmp_path: Path, causal_lm: Path) -> None:
    data = rows(64)
    used = settings(causal_lm, lora=Lora(rank=4, alpha=8), learning_rate=1e-2)
    train((data, data), (0.0,), score_rule("softmax", 2), used, tmp_path)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "adapter_config.json" not in names
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert not [name for name, _ in stock.named_parameters() if "lora" in name]
    scores = router_scores(checkpoint(tmp_path, used, "softmax", 2), data)
    assert scores[[bool(row.label) for row in data]].mean() > scores.mean()


def test_a_reward_model_lends_its_doubt_as_the_first_guess(reward_model: Path) -> None:
    judge = AutoModelForTokenClassification.from_pretrained(reward_model)
    router: Any = initial_model(settings(reward_model), 2)
    assert torch.equal(router.score.weight[1], judge.score.weight[0])
    assert torch.equal(router.score.weight[0], judge.score.weight[1])
    (reward_model / "prm.json").write_text(json.dumps({"positive_label": 0}))
    turned: Any = initial_model(settings(reward_model), 2)
    assert torch.equal(turned.score.weight[1], judge.score.weight[1])


def test_zeros_of_the_checkpoint_stay_zero_and_frozen_layers_stay_as_they_are(
    tmp_path: Path, reward_model: Path
) -> None:
    data, used = rows(32), settings(reward_model, frozen_layers=1, epochs=2.0)
    train((data, data), (0.0,), score_rule("softmax", 2), used, tmp_path / "out")
    before = AutoModelForTokenClassification.from_pretrained(reward_model)
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    first, last = after.model.layers[0], after.model.layers[-1]
    assert torch.equal(first.mlp.down_proj.weight, before.model.layers[0].mlp.down_proj.weight)
    changed = last.mlp.down_proj.weight != before.model.layers[-1].mlp.down_proj.weight
    assert bool(changed[1:].any())
    assert not bool(last.mlp.down_proj.weight[0].any())


def test_a_training_that_was_cut_short_goes_on_from_its_checkpoint_and_ends_alike(
    tmp_path: Path, causal_lm: Path
) -> None:
    data, rule = rows(32), score_rule("softmax", 2)
    used = settings(causal_lm, epochs=4.0, evaluations=4)
    train((data, data), (0.0,), rule, used, tmp_path / "whole")
    train((data, data), (0.0,), rule, used, tmp_path / "cut")
    (tmp_path / "cut" / "model" / "model.safetensors").unlink()
    newest = max((tmp_path / "cut" / "checkpoints").iterdir(), key=lambda p: int(p.name[11:]))
    # What a kill in the middle of writing it leaves.
    (newest / "trainer_state.json").unlink()
    train((data, data), (0.0,), rule, used, tmp_path / "cut")
    ends = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "model")
        for name in ("whole", "cut")
    ]
    for left, right in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init": "org/name"}, "org/name@revision"),
        ({"frozen_layers": 99}, r"train\.frozen_layers: 99 asked for"),
    ],
)
def test_what_cannot_be_started_from_is_named(
    causal_lm: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigInvalid, match=said):
        initial_model(settings(causal_lm).model_copy(update=changes), 2)


def test_a_trained_router_is_one_that_the_service_takes(tmp_path: Path, causal_lm: Path) -> None:
    data, used = rows(16), settings(causal_lm, epochs=1.0)
    train((data, data), (0.0,), score_rule("softmax", 2), used, tmp_path)
    folder = checkpoint(tmp_path, used, "softmax", 2)
    loaded = load_model(str(folder), ModelKind.SEQUENCE_CLASSIFICATION)
    assert TransformersRouter(loaded).description.is_annotated
    assert json.loads((folder / "training.json").read_text())["epochs"] == 1.0
