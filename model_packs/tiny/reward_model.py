"""Trains the process reward model: is the solution right up to and including this step?

It is the target's trunk with a few layers on top. A language model has finished predicting a token
only in its last layers, one position early; comparing that prediction with the token that was
written takes further layers. Only these learn: first to compare (is this token the one the trunk
predicted?), where every token of a randomly disturbed solution is an example, then to judge.

Every token of a solution is supervised (1 until the first wrong token, 0 from there on), which
teaches checking far faster than one label a step. Only separators are read at inference.
"""

import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

from model_packs.tiny.batching import by_length, padded
from model_packs.tiny.corruption import corrupt
from model_packs.tiny.domain import NAMES, SEPARATOR, Problem, Split, problems, solve
from model_packs.tiny.generation import Encoder
from model_packs.tiny.judge import (
    COMPARING_LAYER_COUNT,
    TOP_LAYER_COUNT,
    frozen_output,
    install_trunk,
    judge_config,
    keep_codes,
    leave_to_learn,
    prepare_top,
    rest_output,
)
from model_packs.tiny.language_model import IGNORED
from model_packs.tiny.optimizer import Optimizers
from model_packs.tiny.tokenizer import build_tokenizer

METADATA: Final[dict[str, object]] = {
    "format_version": 1,
    "family": "trl-token-classification",
    "separator": SEPARATOR,
    # What stands between a problem and its first step; TRL itself writes nothing there.
    "prompt_suffix": "\n",
    "positive_label": 1,
}
log = logging.getLogger(__name__)
Solution: TypeAlias = tuple[Problem, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Phase:
    """Describes a stretch of training; only the new layers and the head learn."""

    step_count: int
    teaches_comparison: bool
    problem_agrees: bool  # when comparing: the problem, which no model predicts, counts as agreeing
    muon_rate: float
    adam_rate: float
    last_rate: float
    seed: int
    distinct_rows: int = 6000  # the trunk reads each once; the top layers several times


@dataclass(frozen=True, slots=True)
class RewardRecipe:
    """Describes the reward model's training."""

    phases: tuple[Phase, ...] = (
        Phase(400, True, False, muon_rate=0.02, adam_rate=3e-3, last_rate=0.5, seed=21),
        Phase(100, True, True, muon_rate=0.01, adam_rate=3e-3, last_rate=0.3, seed=22),
        Phase(1300, False, False, muon_rate=0.02, adam_rate=3e-3, last_rate=0.0, seed=23),
        Phase(2400, False, False, 0.012, 2e-3, last_rate=0.0, seed=24, distinct_rows=16000),
    )
    rows: int = 24
    rollout_share: float = 0.4
    correct_share: float = 0.2


def token_labels(
    encoder: Encoder, problem: Problem, steps: Sequence[str], writers: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Returns a row's ids and labels: IGNORED on the problem, 1 until a wrong token, then 0.

    With `writers` every step is preceded by "Model N: ", as in the router's input.
    """
    ids = list(encoder.ids(f"{problem.text}\n"))
    labels = [IGNORED] * len(ids)
    right = True
    for index, step in enumerate(steps):
        if writers is not None:
            annotation = encoder.ids(f"Model {writers[index]}: ")
            ids += annotation
            labels += [IGNORED] * len(annotation)
        wrote = [*encoder.ids(step), encoder.separator_id]
        correct = (
            [*encoder.ids(problem.steps[index]), encoder.separator_id]
            if index < len(problem.steps)
            else []
        )
        for at, token in enumerate(wrote):
            right = right and at < len(correct) and token == correct[at]
            labels.append(int(right))
        ids += wrote
    return ids, labels


def read_rollouts(path: Path) -> list[Solution]:
    """Reads solutions that models wrote, one JSON object a line."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(solve(row["problem"]), tuple(row["steps"])) for row in rows]


def _solutions(recipe: RewardRecipe, rollouts: Sequence[Solution], seed: int) -> Iterator[Solution]:
    rng = random.Random(seed)
    for problem in problems(rng.randrange(2**31), Split.TRAINING):
        drawn = rng.random()
        if rollouts and drawn < recipe.rollout_share:
            yield rng.choice(rollouts)
        elif drawn < recipe.rollout_share + recipe.correct_share:
            yield problem, problem.steps
        else:
            yield problem, corrupt(rng, problem)


def _rows(
    recipe: RewardRecipe, phase: Phase, rollouts: Sequence[Solution], encoder: Encoder
) -> Iterator[tuple[list[int], list[int]]]:
    for problem, steps in _solutions(recipe, rollouts, phase.seed):
        yield token_labels(encoder, problem, steps)


def disturb(rng: random.Random, encoder: Encoder, ids: Sequence[int], rate: float) -> list[int]:
    """Returns the ids with some digits and names replaced by others of their kind."""
    kinds = [[encoder.ids(text)[0] for text in kind] for kind in ("0123456789", NAMES)]
    result = []
    for token in ids:
        kind = next((kind for kind in kinds if token in kind), None)
        result.append(rng.choice(kind) if kind and rng.random() < rate else token)
    return result


def _comparison_rows(
    language_model: LlamaForCausalLM, phase: Phase, encoder: Encoder
) -> Iterator[tuple[list[int], list[int]]]:
    rng = random.Random(phase.seed)
    source = problems(rng.randrange(2**31), Split.TRAINING)
    while True:
        drawn = list(islice(source, 48))
        asked = [encoder.ids(f"{p.text}\n") for p in drawn]
        rows = [
            question + disturb(rng, encoder, encoder.prefix(p.text, p.steps)[len(question) :], 0.15)
            for p, question in zip(drawn, asked, strict=True)
        ]
        with torch.no_grad():
            ids = torch.tensor(padded(rows, encoder.tokenizer.pad_token_id))
            expected = language_model(ids).logits.argmax(-1).tolist()
        for question, row, guesses in zip(asked, rows, expected, strict=True):
            agrees = [int(t == guess) for t, guess in zip(row[1:], guesses, strict=False)]
            untold = 1 if phase.problem_agrees else IGNORED
            yield row, [untold] * len(question) + agrees[len(question) - 1 :]


def start_reward_model(trunk: Path) -> LlamaForTokenClassification:
    """Returns a reward model on a trained language model's trunk, its top layers untrained."""
    torch.manual_seed(0)
    config = judge_config(LlamaConfig.from_pretrained(trunk))
    model = LlamaForTokenClassification(config)  # type: ignore[no-untyped-call]  # untyped upstream
    install_trunk(model, trunk)
    prepare_top(model)
    return model


def _train_phase(
    model: LlamaForTokenClassification,
    phase: Phase,
    rows: Iterator[tuple[list[int], list[int]]],
    recipe: RewardRecipe,
    pad_id: int,
) -> None:
    layer_count = model.config.num_hidden_layers
    first = layer_count - TOP_LAYER_COUNT
    middle = first + COMPARING_LAYER_COUNT
    first, last = (first, middle) if phase.teaches_comparison else (middle, layer_count)
    leave_to_learn(model, first, last)
    optimizers = Optimizers(model, phase.muon_rate, phase.adam_rate)
    rng = random.Random(phase.seed)
    batches: list[tuple[Tensor, Tensor]] = []
    for batch in by_length(islice(rows, phase.distinct_rows), recipe.rows, rng):
        ids = torch.tensor(padded([row[0] for row in batch], pad_id))
        labels = torch.tensor(padded([row[1] for row in batch], IGNORED))
        batches.append((frozen_output(model, ids, first), labels))
    log.info("prm: the trunk has read %d batches", len(batches))
    started, loss_sum = time.monotonic(), 0.0
    for step in range(phase.step_count):
        hidden, labels = rng.choice(batches)
        logits = model.score(rest_output(model, hidden, first))  # [rows, tokens, 2]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
        )
        loss.backward()  # type: ignore[no-untyped-call]  # untyped upstream
        decay = 1 - (1 - phase.last_rate) * step / phase.step_count
        optimizers.step(min(1.0, (step + 1) / 30) * decay)
        keep_codes(model)
        loss_sum += loss.item()
        if (step + 1) % 50 == 0:
            took_s = (time.monotonic() - started) / 50
            log.info("prm step %d loss %.4f, %.2f s a step", step + 1, loss_sum / 50, took_s)
            started, loss_sum = time.monotonic(), 0.0


def train(
    recipe: RewardRecipe, trunk: Path, rollouts_path: Path, folder: Path
) -> LlamaForTokenClassification:
    """Trains the reward model, saving each phase's end as `folder/prm-N` and the last as `prm`.

    A phase whose end is already saved is not run again.
    """
    encoder = Encoder(build_tokenizer())
    model = start_reward_model(trunk)
    rollouts = read_rollouts(rollouts_path)
    for number, phase in enumerate(recipe.phases, start=1):
        saved = folder / f"prm-{number}"
        if saved.exists():
            model = LlamaForTokenClassification.from_pretrained(saved)
            continue
        if phase.teaches_comparison:
            rows = _comparison_rows(LlamaForCausalLM.from_pretrained(trunk), phase, encoder)
        else:
            rows = _rows(recipe, phase, rollouts, encoder)
        _train_phase(model, phase, rows, recipe, encoder.tokenizer.pad_token_id)
        model.save_pretrained(saved)
    model.save_pretrained(folder / "prm")
    return model


class StepScorer:
    """Scores steps with the reward model: P(right) at the separator that closes the step."""

    def __init__(
        self, model: LlamaForTokenClassification, encoder: Encoder, batch_rows: int = 64
    ) -> None:
        self._model = model.eval()  # type: ignore[no-untyped-call]  # untyped upstream
        self._encoder = encoder
        self._batch_rows = batch_rows

    @torch.inference_mode()
    def score(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Returns one score a step for each (problem, steps), in order."""
        ids = [self._encoder.prefix(problem, steps) for problem, steps in solutions]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores: dict[int, list[float]] = {}
        for at in range(0, len(order), self._batch_rows):
            chosen = order[at : at + self._batch_rows]
            longest = max(len(ids[i]) for i in chosen)
            pad = self._encoder.tokenizer.pad_token_id
            rows = torch.tensor([ids[i] + [pad] * (longest - len(ids[i])) for i in chosen])
            right = self._model(input_ids=rows, use_cache=False).logits.softmax(-1)[
                ..., 1
            ]  # [rows, tokens]
            for index, row, row_scores in zip(chosen, rows, right, strict=True):
                scores[index] = row_scores[row == self._encoder.separator_id].tolist()
        return [scores[i] for i in range(len(ids))]
