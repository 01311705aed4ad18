"""Does the picture hold for larger models? A draft of ~10 M and a target of ~150 M parameters.

`python -m benchmarks.gpu.larger_miniature --work FOLDER --device cuda` trains both, and a reward
model on the target, on the tiny pack's domain made harder (3 to 6 operations, larger numbers),
and puts them together as a pack. Then

    python -m router_training run --config FOLDER/router.toml
    python -m benchmarks.gpu.larger_miniature --work FOLDER --take-router
    python -m benchmarks.frontier --pack FOLDER/pack --device cuda --json … --plot …

`--size small` does all of it with models of a minute, which is how it is tested without a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

from model_packs.tiny import pack as packing
from model_packs.tiny.batching import by_length, padded
from model_packs.tiny.corruption import corrupt
from model_packs.tiny.domain import Mixture, Split, problems
from model_packs.tiny.generation import Encoder
from model_packs.tiny.language_model import IGNORED, RowMaker, Shape, Stage
from model_packs.tiny.reward_model import METADATA, token_labels
from model_packs.tiny.tokenizer import build_tokenizer, save_tokenizer
from router_training.config import read_config
from services.engines.revisions import RevisionStore

log = logging.getLogger(__name__)
HARDER = Mixture(
    operation_weights=((3, 0.3), (4, 0.3), (5, 0.2), (6, 0.2)),
    product_rate=0.25,
    largest_start=90,
    largest_amount=99,
    largest_factor=9,
    one_digit_rate=0.3,
)
HELD_OUT_SEED, QUESTION_SEED, REWARD_SEED = 9002, 1001, 71


@dataclass(frozen=True, slots=True)
class Size:
    """Shapes and lengths of a run. Steps are optimiser steps of `rows` rows."""

    draft: Shape
    target: Shape
    draft_steps: int
    target_steps: int
    reward_steps: int
    rows: int
    row_tokens: int
    held_out_count: int
    question_count: int
    learning_rate: float


LARGE = Size(
    draft=Shape(8, 320, 960),  # about 10 M
    target=Shape(20, 768, 2560),  # about 150 M
    draft_steps=3_000,
    target_steps=6_000,
    reward_steps=3_000,
    rows=256,
    row_tokens=320,
    held_out_count=500,
    question_count=8_000,
    learning_rate=6e-4,
)
SMALL = Size(Shape(1, 32, 64), Shape(2, 64, 128), 4, 4, 4, 4, 320, 8, 24, 1e-3)
SIZES = {"large": LARGE, "small": SMALL}


def model_config(shape: Shape) -> LlamaConfig:
    """Returns a Llama configuration of this shape, its heads of 64 dimensions where they fit."""
    tokenizer = build_tokenizer()
    head_dim = 64 if shape.width % 64 == 0 else 32
    heads = shape.width // head_dim
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward_width,
        num_hidden_layers=shape.layer_count,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def optimise(
    name: str,
    model: Any,
    step_count: int,
    rate: float,
    batches: Iterator[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Trains with AdamW, warm-up and cosine decay, in bfloat16 where the device is a GPU."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=step_count, pct_start=min(0.5, 1 / max(2, step_count // 50))
    )
    started, seen = time.monotonic(), 0
    model.train()
    for step, (ids, labels) in enumerate(islice(batches, step_count), start=1):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids.to(device), use_cache=False).logits
            loss = loss_of(logits.float(), labels.to(device))
        loss.backward()  # type: ignore[no-untyped-call]  # untyped upstream
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        seen += ids.numel()
        if step % max(1, step_count // 20) == 0:
            speed = seen / (time.monotonic() - started)
            log.info("%s %d/%d loss %.4f, %.0f tokens/s", name, step, step_count, loss, speed)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns cross-entropy of each token given those before it."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns cross-entropy of each token's own class."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
    )


def train_writer(name: str, shape: Shape, steps: int, size: Size, work: Path, device: str) -> None:
    """Trains a language model from scratch and saves it as `work/name`."""
    torch.manual_seed(len(name))
    model: Any = LlamaForCausalLM(model_config(shape))
    model.to(device)
    stage = Stage(shape, steps, size.row_tokens, size.rows, HARDER, seed=len(name))
    rows = RowMaker(build_tokenizer(), stage)
    log.info("%s: %.1f M parameters", name, model.num_parameters() / 1e6)
    optimise(name, model, steps, size.learning_rate, iter(rows.batch, None), next_token_loss)
    model.save_pretrained(work / name)


def reward_batches(size: Size) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields ids and per-token labels of right and corrupted solutions."""
    encoder, rng = Encoder(build_tokenizer()), random.Random(REWARD_SEED)

    def rows() -> Iterator[tuple[list[int], list[int]]]:
        for problem in problems(REWARD_SEED, Split.TRAINING, HARDER):
            steps = problem.steps if rng.random() < 0.35 else corrupt(rng, problem)
            yield token_labels(encoder, problem, steps)

    pad = encoder.tokenizer.pad_token_id
    for batch in by_length(rows(), size.rows, rng):
        ids = torch.tensor(padded([row[0] for row in batch], pad))
        yield ids, torch.tensor(padded([row[1] for row in batch], IGNORED))


def train_reward_model(size: Size, work: Path, device: str) -> None:
    """Trains every layer of the target as a judge of each token and saves it as `work/prm`."""
    config = LlamaConfig.from_pretrained(work / "target")
    config.num_labels = 2
    torch.manual_seed(REWARD_SEED)
    model: Any = LlamaForTokenClassification.from_pretrained(work / "target", config=config)
    model.to(device)
    rate = size.learning_rate / 4
    optimise("prm", model, size.reward_steps, rate, reward_batches(size), token_loss)
    model.save_pretrained(work / "prm")


def put_together(size: Size, work: Path) -> Path:
    """Makes a pack folder; its router is the untrained reward model until one was trained."""
    pack = work / "pack"
    pack.mkdir(parents=True, exist_ok=True)
    for name in ("draft", "target"):
        packing.export(LlamaForCausalLM.from_pretrained(work / name), name, None, pack)
    prm = LlamaForTokenClassification.from_pretrained(work / "prm")
    packing.export(prm, "prm", METADATA, pack)
    held_out = list(islice(problems(HELD_OUT_SEED, Split.HELD_OUT, HARDER), size.held_out_count))
    lines = [
        json.dumps(
            {"id": p.problem_id, "problem": p.text, "answer": str(p.answer), "kind": p.kind.value}
        )
        for p in held_out
    ]
    packing.write_atomically(pack / "problems.jsonl", "\n".join(lines) + "\n")
    asked = list(islice(problems(QUESTION_SEED, Split.TRAINING, HARDER), size.question_count))
    packing.write_questions(asked, pack)
    placeholder(work, pack)
    packing.write_manifest(pack)
    return pack


def placeholder(work: Path, pack: Path) -> None:
    """Puts the reward model into the router's place, its doubt as the router's score."""
    from router_training.config import Train
    from router_training.model import initial_model

    model = initial_model(Train(init=str(pack / "prm"), annotated=False), 2)
    model.save_pretrained(work / "router-0")
    save_tokenizer(work / "router-0")
    metadata = {
        "format_version": 1,
        "annotation": False,
        "score_rule": {"kind": "softmax", "positive_class": 1},
        "num_labels": 2,
        "default_threshold": 0.5,
        "calibration": [],
    }
    packing.write_atomically(work / "router-0" / "router.json", json.dumps(metadata))
    packing.take_router(work / "router-0", pack)


def write_router_config(size: Size, work: Path, device: str) -> Path:
    """Writes the configuration with which `router_training` makes this pack's router."""
    path = work / "router.toml"
    packing.write_atomically(
        path,
        f"""work = "{work}/router"
[services]
pack = "{work}/pack"
device = "{device}"
[questions]
source = "{work}/pack/questions.jsonl"
stratify_by = "kind"
count = {size.question_count}
[collect]
prefix_policies = {{ oracle = 0.5, random = 0.5 }}
random_rate = 0.4
max_steps = 10
max_step_tokens = 48
concurrency = 32
[label]
validation_share = 0.2
test_share = 0.2
[train]
init = "{work}/pack/prm"
annotated = false
epochs = 2
batch_rows = 32
learning_rate = 3e-5
weight_decay = 0.0
[evaluate]
calibration_questions = {min(300, size.question_count // 4)}
default_target_share = 0.45
[promote]
location = "{work}/serving"
""",
    )
    return path


def take_router(work: Path) -> None:
    """Puts the promoted router into the pack."""
    store = RevisionStore(read_config(work / "router.toml").promote.location)
    revision = store.current()
    if revision is None:
        raise SystemExit(f"{store.location}: nothing is promoted; run router_training first")
    packing.take_router(store.fetch(revision, work), work / "pack")
    packing.write_manifest(work / "pack")


def build(size: Size, work: Path, device: str) -> Path:
    """Trains what is not there yet and puts the pack together."""
    for name, shape, steps in (
        ("draft", size.draft, size.draft_steps),
        ("target", size.target, size.target_steps),
    ):
        if not (work / name / "config.json").exists():
            train_writer(name, shape, steps, size, work, device)
    if not (work / "prm" / "config.json").exists():
        train_reward_model(size, work, device)
    write_router_config(size, work, device)
    return put_together(size, work)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and the pack")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--take-router", action="store_true", help="only take what was promoted")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.take_router:
        take_router(asked.work)
        return
    log.info("pack: %s", build(SIZES[asked.size], asked.work.resolve(), asked.device))


if __name__ == "__main__":
    main()
