"""How each family of process reward models reads steps: input, width of its answer, and score.

A reading is made from a tokenizer alone, so it is the same for weights that are loaded here and
for weights on another server.

Sources: the model cards and code of Skywork-o1-Open-PRM, Qwen2.5-Math-PRM and Math-Shepherd, and
TRL's PRM trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from transformers import PreTrainedTokenizerBase

from services.engines.loading import ModelLoadError
from services.engines.prm_layouts import ClosedSteps, MarkedText, PrmLayout
from services.engines.router_format import FormatError, PrmFormat, SoftmaxRule, read_prm_format
from services.engines.tokenization import PieceTokenizer

_QWEN_SYSTEM: Final = "Please reason step by step, and put your final answer within \\boxed{}."
_QWEN_MARK: Final = "<extra_0>"
_SHEPHERD_MARK: Final = " ки"
_SHEPHERD_LABELS: Final = ("+", "-")


class StepRule(Protocol):
    """Turns the logits at a step into its score."""

    def score(self, logits: Sequence[float]) -> float:
        """Returns the reward in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class SigmoidRule:
    """One value, whose sigmoid is the score."""

    def score(self, logits: Sequence[float]) -> float:
        """Returns the reward in [0, 1]."""
        value = logits[0]
        return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


@dataclass(frozen=True, slots=True)
class PrmReading:
    """How a model is read: the head's `logit_count` values at a step are its score by `rule`."""

    layout: PrmLayout
    rule: StepRule
    logit_count: int


@dataclass(frozen=True, slots=True)
class PrmTokenizer:
    """A model's tokenizer: piece by piece, and as transformers knows it.

    `reference` names it to people; `folder` is where its files lie, if that is known.
    """

    reference: str
    pieces: PieceTokenizer
    chat: PreTrainedTokenizerBase
    folder: Path | None

    @property
    def start_ids(self) -> tuple[int, ...]:
        """The bos, which some families put before the problem wherever the tokenizer has one."""
        bos_id = self.chat.bos_token_id
        return (bos_id,) if isinstance(bos_id, int) else ()


def trl_reading(tokenizer: PrmTokenizer) -> PrmReading:
    """Reads a token classifier of TRL's trainer, or as `prm.json` says.

    Raises:
        ModelLoadError: so do the other readings, where the tokenizer is not of their family.
    """
    path = None if tokenizer.folder is None else tokenizer.folder / "prm.json"
    try:
        known = read_prm_format(path) if path is not None and path.exists() else PrmFormat()
    except FormatError as error:
        raise ModelLoadError(
            tokenizer.reference, f"prm.json: {error}", "correct prm.json"
        ) from error
    layout = ClosedSteps(
        tokenizer.pieces,
        start_ids=tokenizer.start_ids,
        close_ids=separator_ids(tokenizer.pieces, tokenizer.reference, known.separator),
        head=lambda problem: problem + known.prompt_suffix,
    )
    return PrmReading(layout, SoftmaxRule(known.positive_label), 2)


def skywork_reading(tokenizer: PrmTokenizer) -> PrmReading:
    """Reads a value head at the line end behind each step."""
    layout = ClosedSteps(
        tokenizer.pieces,
        start_ids=tokenizer.start_ids,
        close_ids=separator_ids(tokenizer.pieces, tokenizer.reference, "\n")[-1:],
        head=lambda problem: f"{problem}\n",
    )
    return PrmReading(layout, SigmoidRule(), 1)


def qwen_math_reading(tokenizer: PrmTokenizer) -> PrmReading:
    """Reads a classifier at the mark behind each step of a chat's answer."""
    layout = ClosedSteps(
        tokenizer.pieces,
        start_ids=(),
        close_ids=(_one_id(tokenizer, _QWEN_MARK),),
        head=_qwen_head(tokenizer),
        opens_in_head=True,
    )
    return PrmReading(layout, SoftmaxRule(1), 2)


def math_shepherd_reading(tokenizer: PrmTokenizer) -> PrmReading:
    """Reads "+" over "-" at the mark that ends each line."""
    # A whole step ends in the mark's last token.
    separator_ids(tokenizer.pieces, tokenizer.reference, _SHEPHERD_MARK)
    return PrmReading(MarkedText(tokenizer.pieces, _SHEPHERD_MARK), SoftmaxRule(0), 2)


def math_shepherd_labels(tokenizer: PrmTokenizer) -> tuple[int, ...]:
    """Returns the ids whose logits of the language head are read."""
    return tuple(_one_id(tokenizer, f" {label}") for label in _SHEPHERD_LABELS)


def separator_ids(tokenizer: PieceTokenizer, reference: str, separator: str) -> tuple[int, ...]:
    """Returns the ids of the text that ends a step.

    Raises:
        ModelLoadError: there are none.
    """
    ids = tokenizer.encode(separator)
    if not ids:
        raise ModelLoadError(
            reference,
            f"its tokenizer turns the separator {separator!r} into no token, so no step has a "
            "place to be judged at",
            "use a tokenizer that keeps newlines",
        )
    return ids


def _qwen_head(tokenizer: PrmTokenizer) -> Callable[[str], str]:
    chat: Any = tokenizer.chat
    if not chat.chat_template:
        raise ModelLoadError(
            tokenizer.reference, "its tokenizer has no chat template", "fetch tokenizer_config.json"
        )

    def head(problem: str) -> str:
        turns = [
            {"role": "system", "content": _QWEN_SYSTEM},
            {"role": "user", "content": problem},
        ]
        text = chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    return head


def _one_id(tokenizer: PrmTokenizer, text: str) -> int:
    ids = tokenizer.pieces.encode(text)
    # Tokenizers of the Llama kind put a space of their own before it, at times as a token.
    if len(ids) > 1:
        ids = tokenizer.pieces.encode(text.strip())
    if len(ids) != 1:
        raise ModelLoadError(
            tokenizer.reference,
            f"its tokenizer has no single token for {text.strip()!r}, which its family reads",
            "use the checkpoint's own tokenizer, or name another ARBITRAGE_PRM_FAMILY",
        )
    return ids[0]
