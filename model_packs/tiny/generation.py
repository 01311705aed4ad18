"""Writes steps for many prefixes at once, greedily, with one shared key-value cache layout.

Prefixes are left-padded into one batch; every row stops at its own separator or end token. Only the
offline stages use this; the product's engines are written for serving.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from model_packs.tiny.domain import SEPARATOR

STEP_TOKENS: Final = 40
STEPS_AT_MOST: Final = 8


@dataclass(frozen=True, slots=True)
class WrittenStep:
    """Holds one step's text and whether the model ended the solution with it."""

    text: str
    ended: bool
    token_count: int


class Encoder:
    """Turns problems and steps into ids, each piece on its own, remembering what it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.separator_id = int(str(tokenizer.convert_tokens_to_ids(SEPARATOR)))
        self._seen: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Returns the ids of one piece of text."""
        if text not in self._seen:
            self._seen[text] = self.tokenizer.encode(text)
        return self._seen[text]

    def prefix(self, problem: str, steps: Sequence[str]) -> list[int]:
        """Returns the ids a language model writes the next step from."""
        ids = list(self.ids(f"{problem}\n"))
        for step in steps:
            ids += [*self.ids(step), self.separator_id]
        return ids


class StepWriter:
    """Writes the next step of many prefixes with one language model."""

    def __init__(self, model: LlamaForCausalLM, encoder: Encoder, batch_rows: int = 256) -> None:
        self._model = model.eval()  # type: ignore[no-untyped-call]  # untyped upstream
        self._encoder = encoder
        self._batch_rows = batch_rows

    def write(self, prefixes: Sequence[tuple[str, Sequence[str]]]) -> list[WrittenStep]:
        """Returns the next step of each (problem, steps), in order."""
        ids = [self._encoder.prefix(problem, steps) for problem, steps in prefixes]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        written: dict[int, WrittenStep] = {}
        for at in range(0, len(order), self._batch_rows):
            chosen = order[at : at + self._batch_rows]
            steps = self._write_batch([ids[i] for i in chosen])
            written |= zip(chosen, steps, strict=True)
        return [written[i] for i in range(len(ids))]

    @torch.inference_mode()
    def _write_batch(self, prefixes: list[list[int]]) -> list[WrittenStep]:
        tokenizer = self._encoder.tokenizer
        end_id, pad_id, separator_id = (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            self._encoder.separator_id,
        )
        longest = max(map(len, prefixes))
        padding = torch.tensor([longest - len(p) for p in prefixes])
        ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prefixes])
        mask = (torch.arange(longest)[None] >= padding[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        open_rows = torch.ones(len(prefixes), dtype=torch.bool)
        chosen: list[torch.Tensor] = []
        for _ in range(STEP_TOKENS):
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            )
            token = output.logits[:, -1].argmax(-1)
            token = torch.where(open_rows, token, pad_id)
            chosen.append(token)
            open_rows &= (token != separator_id) & (token != end_id)
            if not open_rows.any():
                break
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones(len(prefixes), 1)], 1)
            positions = positions[:, -1:] + 1
        rows = torch.stack(chosen, 1).tolist()
        return [self._step(row, separator_id, end_id, pad_id) for row in rows]

    def _step(self, row: list[int], separator_id: int, end_id: int, pad_id: int) -> WrittenStep:
        stops = [i for i, token in enumerate(row) if token in (separator_id, end_id)]
        stop = stops[0] if stops else len(row)
        text = str(self._encoder.tokenizer.decode([t for t in row[:stop] if t != pad_id]))
        return WrittenStep(text, bool(stops) and row[stop] == end_id, min(stop + 1, len(row)))


def solve_all(writer: StepWriter, problems: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the whole solution that one model alone writes for each problem."""
    steps: list[list[str]] = [[] for _ in problems]
    live = list(range(len(problems)))
    for _ in range(STEPS_AT_MOST):
        wrote = writer.write([(problems[i], steps[i]) for i in live])
        for index, step in zip(live, wrote, strict=True):
            steps[index].append(step.text)
        live = [i for i, step in zip(live, wrote, strict=True) if not step.ended]
        if not live:
            break
    return [tuple(s) for s in steps]
