"""Labels pairs with the reward model and trains the router on them.

The router reads problem, committed steps with their writers and the draft's candidate, and answers
on the last separator: would the target's step earn a clearly better reward? It starts from the
reward model, whose verdict "wrong" is the router's first guess at "escalate".
"""

import dataclasses
import hashlib
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

from arbitrage.core.prompts import problem_text, router_steps
from arbitrage.core.steps import Source, Step
from model_packs.tiny.batching import by_length, padded
from model_packs.tiny.generation import Encoder
from model_packs.tiny.judge import (
    TOP_LAYER_COUNT,
    frozen_output,
    install_trunk,
    keep_codes,
    leave_to_learn,
    rest_output,
)
from model_packs.tiny.optimizer import Optimizers
from model_packs.tiny.pairs import DRAFT, TARGET, Pair
from model_packs.tiny.reward_model import StepScorer
from model_packs.tiny.tokenizer import build_tokenizer

log = logging.getLogger(__name__)
_SOURCES: Final = {DRAFT: Source.DRAFT, TARGET: Source.TARGET}
DEAD_BAND: Final = (
    0.1  # scores are continuous: nearer than this the two steps are as good as each other
)


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """Adds the reward model's scores of both steps to a pair; None where the steps are equal."""

    pair: Pair
    draft_score: float | None
    target_score: float | None

    @property
    def advantage(self) -> float:
        """Returns how much better the target's step is in the reward model's eyes."""
        if self.draft_score is None or self.target_score is None:
            return 0.0
        return self.target_score - self.draft_score

    @property
    def label(self) -> int:
        """Returns 1 where the advantage is beyond the dead-band, ties 0."""
        return int(self.advantage > DEAD_BAND)


@dataclass(frozen=True, slots=True)
class RouterRecipe:
    """Describes the router's training."""

    step_count: int = 1700  # about two passes over the rows; four were no better
    rows: int = 24
    muon_rate: float = 0.01
    adam_rate: float = 1e-3
    seed: int = 31


def label_pairs(pairs: Sequence[Pair], scorer: StepScorer) -> list[LabelledPair]:
    """Scores both steps of every pair whose steps differ; equal steps have no advantage."""
    differing = [p for p in pairs if p.draft_step != p.target_step]
    asked = {(p.problem, (*p.steps, s)) for p in differing for s in (p.draft_step, p.target_step)}
    order = sorted(asked)
    scores = {key: row[-1] for key, row in zip(order, scorer.score(order), strict=True)}
    return [
        LabelledPair(
            p,
            scores.get((p.problem, (*p.steps, p.draft_step))),
            scores.get((p.problem, (*p.steps, p.target_step))),
        )
        if p.draft_step != p.target_step
        else LabelledPair(p, None, None)
        for p in pairs
    ]


def router_ids(
    encoder: Encoder, problem: str, steps: Sequence[str], writers: Sequence[int], draft: str
) -> list[int]:
    """Returns the router's input: steps annotated by writer, the candidate as the draft's."""
    history = [Step(text, _SOURCES[writer]) for text, writer in zip(steps, writers, strict=True)]
    ids = list(encoder.ids(problem_text(problem)))
    for text in router_steps(history, draft):
        ids += [*encoder.ids(text), encoder.separator_id]
    return ids


def balanced(rows: Sequence[LabelledPair], seed: int) -> list[LabelledPair]:
    """Returns as many rows of either label, the majority drawn at random."""
    rng = random.Random(seed)
    ones = [row for row in rows if row.label]
    zeros = [row for row in rows if not row.label]
    count = min(len(ones), len(zeros))
    drawn = rng.sample(ones, count) + rng.sample(zeros, count)
    rng.shuffle(drawn)
    return drawn


def rows_digest(rows: Sequence[LabelledPair]) -> str:
    """Returns the sha256 of the training rows, scores included."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(dataclasses.asdict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def start_router(
    reward_model: LlamaForTokenClassification, trunk: Path
) -> LlamaForSequenceClassification:
    """Returns a router with the reward model's top layers, its "wrong" logit as "escalate".

    Its trunk is one that has learned to read annotated steps.
    """
    config = type(reward_model.config).from_dict(reward_model.config.to_dict())
    router = LlamaForSequenceClassification(config)  # type: ignore[no-untyped-call]  # untyped upstream
    router.model.load_state_dict(reward_model.model.state_dict())
    install_trunk(router, trunk)
    with torch.no_grad():
        router.score.weight.copy_(reward_model.score.weight.flip(0))
    return router


def train(
    rows: Sequence[LabelledPair],
    recipe: RouterRecipe,
    reward_model: LlamaForTokenClassification,
    trunk: Path,
    folder: Path,
) -> LlamaForSequenceClassification:
    """Trains the router's top layers and head and saves it as `folder/router`."""
    encoder = Encoder(build_tokenizer())
    router = start_router(reward_model, trunk)
    layer_count = router.config.num_hidden_layers
    first = layer_count - TOP_LAYER_COUNT
    leave_to_learn(router, first, layer_count)
    rng = random.Random(recipe.seed)
    written = (
        (router_ids(encoder, p.problem, p.steps, p.writers, p.draft_step), row.label)
        for row in rows
        for p in (row.pair,)
    )
    batches: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in by_length(written, recipe.rows, rng):
        ids = torch.tensor(padded([row[0] for row in batch], encoder.tokenizer.pad_token_id))
        last = torch.tensor([len(row[0]) - 1 for row in batch])
        labels = torch.tensor([row[1] for row in batch])
        batches.append((frozen_output(router, ids, first), last, labels))
    log.info("router: the trunk has read %d batches", len(batches))
    optimizers = Optimizers(router, recipe.muon_rate, recipe.adam_rate)
    order: list[int] = []
    started, loss_sum = time.monotonic(), 0.0
    for step in range(recipe.step_count):
        order = order or rng.sample(range(len(batches)), len(batches))
        hidden, last, labels = batches[order.pop()]
        output = rest_output(router, hidden, first)[torch.arange(len(last)), last]  # [rows, width]
        loss = torch.nn.functional.cross_entropy(router.score(output), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # untyped upstream
        optimizers.step(min(1.0, (step + 1) / 30) * (1 - step / recipe.step_count))
        keep_codes(router)
        loss_sum += loss.item()
        if (step + 1) % 50 == 0:
            took_s = (time.monotonic() - started) / 50
            log.info("router step %d loss %.4f, %.2f s a step", step + 1, loss_sum / 50, took_s)
            started, loss_sum = time.monotonic(), 0.0
    router.save_pretrained(folder / "router")
    return router


class AdvantageEstimator:
    """Scores candidates with the router, remembering what it has seen."""

    def __init__(
        self, router: LlamaForSequenceClassification, encoder: Encoder, batch_rows: int = 64
    ) -> None:
        self._router = router.eval()  # type: ignore[no-untyped-call]  # untyped upstream
        self._encoder = encoder
        self._batch_rows = batch_rows
        self._seen: dict[tuple[int, ...], float] = {}

    @torch.inference_mode()
    def estimate(self, pairs: Sequence[Pair]) -> list[float]:
        """Returns the router's score for each pair's draft step, softmax[1]."""
        keys = [
            tuple(router_ids(self._encoder, p.problem, p.steps, p.writers, p.draft_step))
            for p in pairs
        ]
        todo = sorted({key for key in keys if key not in self._seen}, key=len)
        for at in range(0, len(todo), self._batch_rows):
            chosen = todo[at : at + self._batch_rows]
            longest = len(chosen[-1])
            pad = self._encoder.tokenizer.pad_token_id
            ids = torch.tensor([[*key, *[pad] * (longest - len(key))] for key in chosen])
            hidden = self._router.model(input_ids=ids, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(chosen)), torch.tensor([len(key) - 1 for key in chosen])]
            for key, score in zip(
                chosen, self._router.score(last).softmax(-1)[:, 1].tolist(), strict=True
            ):
                self._seen[key] = score
        return [self._seen[key] for key in keys]
