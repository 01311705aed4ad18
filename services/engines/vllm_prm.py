"""A process reward model that vLLM runs: ids go to `/pooling`, and the logits at each come back.

vLLM makes an answer of whatever model it is given, by a pooler that its options choose. So the
head's place is looked at: there must be as many rows as tokens, each as wide as the family's head,
and logits rather than probabilities. `/classify` has one class per text, so it is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from arbitrage.core.errors import NotServing, Overloaded, PrmUnavailable
from arbitrage.core.shown import one_line
from arbitrage.core.steps import ModelIdentity, Source, Step
from services.engines.base import EngineStats, StepScores
from services.engines.engine_http import (
    ConnectionBroken,
    EngineSetupError,
    HttpServer,
    ServerError,
    ServerOverloaded,
)
from services.engines.prm_families import QWEN_MATH
from services.engines.prm_readings import PrmReading
from services.engines.router_format import TRL_FAMILY
from services.engines.sequence_reader import refuse_longer
from services.engines.tokenization import PieceTokenizer

# The families that vLLM has a head for, and the options that make it answer for every token.
SERVED_FAMILIES: Final = {
    TRL_FAMILY: "--runner pooling",
    # By itself it answers only at one id, that of the mark in Qwen's own vocabulary.
    QWEN_MATH: """--runner pooling --pooler-config '{"tok_pooling_type": "ALL"}'""",
}
_PROBLEM: Final = "1 + 1"
_STEP: Final = "= 2"


class OddRows(Exception):
    """An answer is not one row of the head's values per token; says what was found."""


@dataclass(frozen=True, slots=True)
class VllmModel:
    """A PRM on the server: `name` there, and how it is read here.

    More than `max_calls` at once are refused.
    """

    name: str
    identity: ModelIdentity
    family: str
    reading: PrmReading
    tokenizer: PieceTokenizer
    max_context_tokens: int
    max_calls: int


class VllmPrm:
    """Implements `PrmEngine` over vLLM's `/pooling`; one call scores all steps of a request."""

    def __init__(self, http: HttpServer, model: VllmModel) -> None:
        self._http = http
        self._model = model
        self._running_count = 0
        self._prefill_token_count = 0
        self._is_closing = False

    @property
    def identity(self) -> ModelIdentity:
        """Names the weights."""
        return self._model.identity

    @property
    def family(self) -> str:
        """Names the input format."""
        return self._model.family

    @property
    def max_context_tokens(self) -> int:
        """Tokens that fit the model's context."""
        return self._model.max_context_tokens

    def stats(self) -> EngineStats:
        """Returns what is asked of the server now; its memory and its queue are its own."""
        return EngineStats(
            queued_requests=0,
            running_requests=self._running_count,
            decoded_token_count=0,
            prefill_token_count=self._prefill_token_count,
            cached_token_count=0,
            cache_bytes=0,
            cache_capacity_bytes=0,
        )

    async def check_head(self) -> None:
        """Asks for one short step, and looks whether the family's head is what answers.

        Raises:
            EngineSetupError: something else does.
            ServerError: the server cannot be reached, or has no time.
        """
        laid_out = await self._model.reading.layout.lay_out(_PROBLEM, [_STEP])
        fix = f"serve a checkpoint of {self.family} with {SERVED_FAMILIES[self.family]}"
        try:
            rows = await self._rows(laid_out.tokens)
        except (ConnectionBroken, ServerOverloaded):
            raise
        except ServerError as error:
            raise EngineSetupError("engine_url", f"no pooling: {error}", fix) from error
        except OddRows as error:
            raise EngineSetupError("engine_url", f"{self._http.url}: {error}", fix) from error
        if self._model.reading.logit_count > 1 and all(map(_is_distribution, rows)):
            raise EngineSetupError(
                "engine_url",
                f"{self._http.url}: sent probabilities where it was asked for logits",
                "serve the model with a vLLM whose /pooling knows use_activation",
            )

    async def warm_up(self) -> None:
        """Scores one short step."""
        await self.score_steps(_PROBLEM, (Step(_STEP, Source.DRAFT),))

    async def close(self) -> None:
        """Closes the connections; calls still running end with `NotServing`."""
        self._is_closing = True
        await self._http.close()

    async def score_steps(
        self, problem: str, steps: tuple[Step, ...], skip_count: int = 0
    ) -> StepScores:
        """Scores the steps after the first `skip_count`.

        Raises:
            ContextTooLong: the sequence does not fit the context; nothing was sent.
            Overloaded: too many calls are under way, here or at the server.
            NotServing: the engine is closing.
            PrmUnavailable: the server gives no answer that can be used.
            Internal: the server refuses what it is asked.
        """
        if not 0 <= skip_count <= len(steps):
            raise ValueError(f"skip_count: expected 0 to {len(steps)}, got {skip_count}")
        model = self._model
        if skip_count == len(steps):
            return StepScores((), model.identity)
        texts, layout = [step.text for step in steps], model.reading.layout
        refuse_longer(
            model.tokenizer.least_token_count(layout.pieces(problem, texts)),
            model.max_context_tokens,
        )
        laid_out = await layout.lay_out(problem, texts)
        refuse_longer(len(laid_out.tokens), model.max_context_tokens)
        rows = await self._answered(laid_out.tokens)
        self._prefill_token_count += len(rows)
        return StepScores(
            values=tuple(
                model.reading.rule.score(rows[at]) for at in laid_out.positions[skip_count:]
            ),
            model=model.identity,
            # Where every token's logits are wanted, vLLM uses none of the prefixes it knows.
            prefill_token_count=len(rows),
        )

    async def _answered(self, tokens: Sequence[int]) -> list[list[float]]:
        """Returns the rows, or raises what a caller of the service is to know."""
        if self._is_closing:
            raise NotServing("the engine is closing")
        if self._running_count >= self._model.max_calls:
            raise Overloaded(
                f"{self._running_count} calls of the model's server are under way; come back, or "
                "raise ARBITRAGE_MAX_BATCH or ARBITRAGE_MAX_QUEUE"
            )
        self._running_count += 1
        try:
            return await self._rows(tokens)
        except ServerError as error:
            if self._is_closing:
                raise NotServing("the engine is closing") from error
            raise error.as_core(PrmUnavailable) from error
        except OddRows as error:
            raise PrmUnavailable(f"{self._http.url}: {error}") from error
        finally:
            self._running_count -= 1

    async def _rows(self, tokens: Sequence[int]) -> list[list[float]]:
        """Returns the head's logits at each token.

        Raises:
            ServerError
            OddRows
        """
        body = {
            "model": self._model.name,
            "input": [list(tokens)],
            "task": "token_classify",
            # The score is made of logits here, by the family's rule.
            "use_activation": False,
            "encoding_format": "float",
        }
        answer = await self._http.post("/pooling", body)
        return _rows_of(answer, len(tokens), self._model.reading.logit_count)


def _rows_of(answer: Any, token_count: int, logit_count: int) -> list[list[float]]:
    expected = f"expected {token_count} rows of {logit_count} numbers, one for each token"
    try:
        [item] = answer["data"]
        rows = item["data"]
    except (KeyError, TypeError, ValueError):
        raise OddRows(f"{expected}, got {one_line(repr(answer), 100)}") from None
    if not isinstance(rows, list):
        raise OddRows(f"{expected}, got {one_line(repr(rows), 100)}")
    if rows and not any(isinstance(row, list) for row in rows):
        raise OddRows(f"{expected}, got one vector of {len(rows)} for the whole text")
    if len(rows) != token_count:
        raise OddRows(f"{expected}, got {len(rows)} rows")
    for row in rows:
        if not isinstance(row, list) or len(row) != logit_count:
            width = len(row) if isinstance(row, list) else one_line(repr(row), 40)
            raise OddRows(f"{expected}, got a row of {width}")
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in row):
            raise OddRows(f"{expected}, got {one_line(repr(row), 100)}")
    return rows


def _is_distribution(row: Sequence[float]) -> bool:
    return all(0 <= value <= 1 for value in row) and math.isclose(sum(row), 1, abs_tol=1e-3)
