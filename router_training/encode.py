"""Turns rows into what a model trains on: token ids and a class."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from arbitrage.core.steps import SEPARATOR, Trajectory
from router_training.errors import DatasetInvalid
from router_training.label import class_of
from router_training.rows import Row
from services.engines.router_input import CandidateTooLong, router_pieces, router_tokens
from services.engines.tokenization import PieceTokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """One row as a model reads it: its ids, its class, and the advantage the class stands for."""

    input_ids: list[int]
    label: int
    advantage: float


class Encoder:
    """Builds a router's inputs with one tokenizer, exactly as the router service does."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, annotated: bool, max_tokens: int
    ) -> None:
        self._tokenizer = PieceTokenizer(tokenizer)
        self._annotated = annotated
        self._max_tokens = max_tokens
        separator = self._tokenizer.encode(SEPARATOR)
        if not separator:
            raise DatasetInvalid(
                f"train.init: its tokenizer turns {SEPARATOR!r} into no token; use another model"
            )
        self._separator_id = separator[-1]

    def ids(self, row: Row) -> list[int]:
        """Returns the ids of prefix and candidate, history cut from the left where too long.

        Raises:
            CandidateTooLong: problem and candidate alone do not fit.
        """
        pieces = router_pieces(
            Trajectory(row.problem, row.history), row.draft_text, annotated=self._annotated
        )
        ids = [self._tokenizer.encode(piece) for piece in pieces]
        tokens, _ = router_tokens(
            ids, self._tokenizer.start_ids, self._separator_id, self._max_tokens
        )
        return tokens

    def examples(self, rows: Sequence[Row], edges: Sequence[float]) -> list[Example]:
        """Returns an example for each row that fits the context; says how many do not."""
        examples = []
        for row in rows:
            try:
                ids = self.ids(row)
            except CandidateTooLong:
                continue
            examples.append(Example(ids, class_of(row.advantage, edges), row.advantage))
        if len(examples) < len(rows):
            _log.warning(
                "%d of %d rows left out: problem and step alone exceed train.max_tokens = %d",
                *(len(rows) - len(examples), len(rows), self._max_tokens),
            )
        if not examples:
            raise DatasetInvalid("train.max_tokens: no row fits; raise it")
        return examples
