"""Trains the draft and the target, stage by stage, from scratch.

A row is one whole problem with its solution, filled up with bare equations to a fixed length: no
token is padding, every batch has one shape, and drills teach arithmetic far more densely than
problems do. The loss is on solutions and on equations' results only.
"""

import logging
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model_packs.tiny.checkpoint import load_checkpoint, save_checkpoint
from model_packs.tiny.domain import (
    SEPARATOR,
    Mixture,
    Problem,
    Split,
    draw_problem,
    drill,
    split_of,
)
from model_packs.tiny.optimizer import Optimizers
from model_packs.tiny.tokenizer import CONTEXT_TOKENS, build_tokenizer

log = logging.getLogger(__name__)
IGNORED: Final = -100


@dataclass(frozen=True, slots=True)
class Shape:
    """Gives a model's size."""

    layer_count: int
    width: int
    feed_forward_width: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Describes one stage of training; a later stage continues from `start` and may add layers."""

    shape: Shape
    step_count: int
    row_tokens: int = 160
    rows: int = 24
    mixture: Mixture = field(default_factory=Mixture)
    first_rate: float = 1.0
    last_rate: float = 1.0
    start: str = ""
    seed: int = 0
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    compiled: bool = True  # compiling takes a minute, which a short stage does not win back


def model_config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Returns a Llama configuration of this shape, with one key-value head of 32 dimensions."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward_width,
        num_hidden_layers=shape.layer_count,
        num_attention_heads=shape.width // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class RowMaker:
    """Makes training rows of one fixed length from problems and equations."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, stage: Stage, first_step: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._stage = stage
        self._rng = random.Random(f"{stage.seed} {first_step}")  # a resumed run sees fresh problems

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts)["input_ids"]
        return ids

    def _problem(self) -> Problem:
        while True:
            problem = draw_problem(self._rng, self._stage.mixture)
            if split_of(problem.text) is Split.TRAINING:
                return problem

    def _solution(self, problem: Problem) -> list[tuple[int, int]]:
        """Returns the solution's (id, label) pairs."""
        result: list[tuple[int, int]] = []
        for index, step in enumerate(problem.steps):
            is_last = index == len(problem.steps) - 1
            end = self._tokenizer.eos_token if is_last else SEPARATOR
            result += [(token, token) for token in self._tokenizer.encode(f"{step}{end}")]
        return result

    def batch(self) -> tuple[Tensor, Tensor]:
        """Returns ids and labels, [rows, row_tokens]; IGNORED where nothing is to learn."""
        drawn = [self._problem() for _ in range(self._stage.rows)]
        asked = self._ids([f"{p.text}\n" for p in drawn])
        solved = [self._solution(p) for p in drawn]
        equations = drill(
            self._rng, self._stage.mixture, self._stage.rows * self._stage.row_tokens // 8
        )
        pool = list(
            zip(
                self._ids([q for q, _ in equations]),
                self._ids([r for _, r in equations]),
                strict=True,
            )
        )
        row_tokens = self._stage.row_tokens
        ids, labels = [], []
        for question, solution in zip(asked, solved, strict=True):
            row = [*question, *(token for token, _ in solution)]
            label = [IGNORED] * len(question) + [wanted for _, wanted in solution]
            while len(row) < row_tokens and pool:
                left, right = pool.pop()
                row += left + right
                label += [IGNORED] * len(left) + right
            row += [self._tokenizer.pad_token_id] * (row_tokens - len(row))
            label += [IGNORED] * (row_tokens - len(label))
            ids.append(row[:row_tokens])
            labels.append(label[:row_tokens])
        return torch.tensor(ids), torch.tensor(labels)


def deepen(model: LlamaForCausalLM, layer_count: int) -> LlamaForCausalLM:
    """Returns a deeper model that computes the same function, new layers spread among the old.

    A new layer is a copy of the one before it with zero output projections, as in LLaMA-Pro.
    """
    old = model.config.num_hidden_layers
    config = LlamaConfig.from_dict(model.config.to_dict() | {"num_hidden_layers": layer_count})
    deep = LlamaForCausalLM(config)
    deep.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(model.model.norm.state_dict())
    previous = -1
    for index, layer in enumerate(deep.model.layers):
        source = index * old // layer_count
        layer.load_state_dict(model.model.layers[source].state_dict())
        if source == previous:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        previous = source
    return deep


def start_model(stage: Stage, folder: Path, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns a fresh model, or the end of the stage's `start`, deepened if need be."""
    torch.manual_seed(stage.seed)
    if not stage.start:
        return LlamaForCausalLM(model_config(stage.shape, tokenizer))
    model = LlamaForCausalLM.from_pretrained(folder / stage.start)
    if model.config.num_hidden_layers == stage.shape.layer_count:
        return model
    return deepen(model, stage.shape.layer_count)


def _rate(stage: Stage, step: int) -> float:
    warm_up = min(1.0, (step + 1) / 50)
    return warm_up * (
        stage.first_rate + (stage.last_rate - stage.first_rate) * step / stage.step_count
    )


def train(name: str, stage: Stage, folder: Path) -> LlamaForCausalLM:
    """Runs one stage, resumed from its checkpoint if any, and saves it as `folder/name`."""
    tokenizer = build_tokenizer()
    model = start_model(stage, folder, tokenizer)
    optimizers = Optimizers(model, stage.muon_rate, stage.adam_rate)
    checkpoint = folder / f"{name}.checkpoint"
    first_step = load_checkpoint(checkpoint, model, optimizers)
    rows = RowMaker(tokenizer, stage, first_step)
    forward = torch.compile(model) if stage.compiled else model
    started, loss_sum = time.monotonic(), 0.0
    for step in range(first_step, stage.step_count):
        ids, labels = rows.batch()
        logits = forward(input_ids=ids, use_cache=False).logits  # [rows, row_tokens, vocabulary]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()  # type: ignore[no-untyped-call]  # untyped upstream
        optimizers.step(_rate(stage, step))
        loss_sum += loss.item()
        if (step + 1) % 50 == 0:
            tokens_per_s = 50 * ids.numel() / (time.monotonic() - started)
            log.info(
                "%s step %d loss %.4f, %.0f tokens/s", name, step + 1, loss_sum / 50, tokens_per_s
            )
            started, loss_sum = time.monotonic(), 0.0
        if (step + 1) % 250 == 0:
            save_checkpoint(checkpoint, model, optimizers, step + 1)
    model.save_pretrained(folder / name)
    return model
