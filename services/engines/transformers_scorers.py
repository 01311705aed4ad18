"""Judges steps with classifiers of transformers: a process reward model and a router."""

from __future__ import annotations

from arbitrage.core.errors import ContextTooLong
from arbitrage.core.ports import RouterDescription
from arbitrage.core.steps import SEPARATOR, ModelIdentity, Score, Source, Step, Trajectory
from services.engines.base import Advantage, EngineStats, StepScores
from services.engines.encoder import EncoderModel
from services.engines.encoder_reader import EncoderReader
from services.engines.loading import LoadedModel, ModelLoadError
from services.engines.router_format import (
    FormatError,
    PrmFormat,
    RouterFormat,
    SoftmaxRule,
    read_prm_format,
    read_router_format,
)
from services.engines.router_input import CandidateTooLong, router_pieces, router_tokens
from services.engines.scheduler import EngineOptions
from services.engines.sequence_reader import SequenceReader, refuse_longer

_PRM_LABEL_COUNT = 2


class TransformersPrm:
    """Implements `PrmEngine` over a token classifier trained by TRL's PRM trainer.

    The input is the problem with the suffix that `prm.json` gives it, and then each step with its
    separator; the score of a step is the probability of the positive label at its separator's
    last token.
    """

    def __init__(self, loaded: LoadedModel, options: EngineOptions | None = None) -> None:
        self._format = _prm_format(loaded)
        self._rule = SoftmaxRule(self._format.positive_label)
        self._identity = loaded.identity
        self._tokenizer = loaded.tokenizer
        # TRL puts a bos before the problem wherever the tokenizer has one.
        self._start_ids = [] if loaded.bos_id is None else [loaded.bos_id]
        self._separator_ids = separator_ids(loaded, self._format.separator)
        self._reader = SequenceReader(loaded, options, "prm")

    @property
    def identity(self) -> ModelIdentity:
        """Names the weights."""
        return self._identity

    @property
    def family(self) -> str:
        """Names the input format."""
        return self._format.family

    @property
    def max_context_tokens(self) -> int:
        """Tokens that fit the model's context, and the cache."""
        return self._reader.max_context_tokens

    def stats(self) -> EngineStats:
        """Returns what the engine is doing now."""
        return self._reader.stats()

    async def warm_up(self) -> None:
        """Scores one short step."""
        await self.score_steps("1 + 1", (Step("= 2", Source.DRAFT),))

    async def close(self) -> None:
        """Stops the model; calls still running end with `NotServing`."""
        await self._reader.close()

    async def score_steps(
        self, problem: str, steps: tuple[Step, ...], skip_count: int = 0
    ) -> StepScores:
        """Scores the steps after the first `skip_count`.

        Raises:
            ContextTooLong: the sequence does not fit the context; nothing was computed.
            Overloaded: the queue is full; nothing was computed.
            NotServing: the engine is closing.
        """
        if not 0 <= skip_count <= len(steps):
            raise ValueError(f"skip_count: expected 0 to {len(steps)}, got {skip_count}")
        if skip_count == len(steps):
            return StepScores((), self._identity)
        texts = [problem + self._format.prompt_suffix, *(step.text for step in steps)]
        refuse_longer(self._tokenizer.least_token_count(texts), self.max_context_tokens)
        prompt_ids, *step_ids = await self._tokenizer.encode_each_async(texts)
        tokens = [*self._start_ids, *prompt_ids]
        positions: list[int] = []
        for ids in step_ids:
            tokens += (*ids, *self._separator_ids)
            positions.append(len(tokens) - 1)
        reading = await self._reader.read(tokens, positions[skip_count:])
        return StepScores(
            values=tuple(self._rule.score(logits) for logits in reading.logits),
            model=self._identity,
            prefill_token_count=reading.prefill_token_count,
            cached_token_count=reading.cached_token_count,
        )


class TransformersRouter:
    """Implements `RouterEngine` over a sequence classifier: a decoder's last token, or an encoder.

    The input is the problem, the history and the candidate, each step closed by the last id of
    the separator. An accepted candidate reads the same as history, so it is known next time.
    """

    def __init__(self, loaded: LoadedModel, options: EngineOptions | None = None) -> None:
        self._format = _router_format(loaded)
        self._identity = loaded.identity
        self._tokenizer = loaded.tokenizer
        self._separator_id = separator_ids(loaded, SEPARATOR)[-1]
        self._reader: SequenceReader | EncoderReader
        if isinstance(loaded.model, EncoderModel):
            self._reader = EncoderReader(loaded.model, options, "router")
        else:
            self._reader = SequenceReader(loaded, options, "router")

    @property
    def identity(self) -> ModelIdentity:
        """Names the weights."""
        return self._identity

    @property
    def description(self) -> RouterDescription:
        """What the router says of itself."""
        known = self._format
        return RouterDescription(
            model=self._identity,
            default_threshold=known.default_threshold,
            calibration=known.calibration,
            is_annotated=known.is_annotated,
            score_rule=known.score_rule.kind,
            prior_logit_shift=known.prior_logit_shift,
            advantage_margin=known.advantage_margin,
        )

    @property
    def max_context_tokens(self) -> int:
        """Tokens that fit the model's context, and the cache."""
        return self._reader.max_context_tokens

    def stats(self) -> EngineStats:
        """Returns what the engine is doing now."""
        return self._reader.stats()

    async def warm_up(self) -> None:
        """Judges one short step."""
        await self.estimate_advantage(Trajectory("1 + 1"), "= 2")

    async def close(self) -> None:
        """Stops the model; calls still running end with `NotServing`."""
        await self._reader.close()

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Advantage:
        """Returns the probability that the target's step beats `draft_text`.

        Raises:
            ContextTooLong: problem and candidate alone do not fit; nothing was computed.
            Overloaded: the queue is full; nothing was computed.
            NotServing: the engine is closing.
        """
        pieces = router_pieces(trajectory, draft_text, annotated=self._format.is_annotated)
        # The history is cut to what fits, these two are not.
        refuse_longer(
            self._tokenizer.least_token_count((pieces[0], pieces[-1])), self.max_context_tokens
        )
        ids = await self._tokenizer.encode_each_async(pieces)
        try:
            tokens, truncated_count = router_tokens(
                ids, self._tokenizer.start_ids, self._separator_id, self.max_context_tokens
            )
        except CandidateTooLong as error:
            raise ContextTooLong(
                "candidate",
                str(error),
                f"do not fit the context of {self.max_context_tokens} tokens",
                "send a shorter problem or step, or use a router with a longer context",
            ) from None
        reading = await self._reader.read(tokens, (len(tokens) - 1,))
        score = Score(
            value=self._format.score_rule.score(reading.logits[0]),
            model=self._identity,
            prefill_token_count=reading.prefill_token_count,
            cached_token_count=reading.cached_token_count,
        )
        return Advantage(score, truncated_count)


def separator_ids(loaded: LoadedModel, separator: str) -> tuple[int, ...]:
    ids = loaded.tokenizer.encode(separator)
    if not ids:
        raise ModelLoadError(
            loaded.reference,
            f"its tokenizer turns the separator {separator!r} into no token, so no step has a "
            "place to be judged at",
            "use a tokenizer that keeps newlines",
        )
    return ids


def _prm_format(loaded: LoadedModel) -> PrmFormat:
    path = loaded.folder / "prm.json"
    try:
        known = read_prm_format(path) if path.exists() else PrmFormat()
    except FormatError as error:
        raise ModelLoadError(loaded.reference, f"prm.json: {error}", "correct prm.json") from error
    if loaded.logit_count != _PRM_LABEL_COUNT:
        raise ModelLoadError(
            loaded.reference,
            f"the head gives {loaded.logit_count} logits, but the family {known.family} reads "
            f"{_PRM_LABEL_COUNT}",
            "use a token classifier with two labels",
        )
    return known


def _router_format(loaded: LoadedModel) -> RouterFormat:
    try:
        known = read_router_format(loaded.folder / "router.json")
    except FormatError as error:
        raise ModelLoadError(
            loaded.reference, f"router.json: {error}", "correct router.json"
        ) from error
    rule, expected = known.score_rule, known.score_rule.logit_count(known.label_count)
    if loaded.logit_count != expected:
        raise ModelLoadError(
            loaded.reference,
            f"the head gives {loaded.logit_count} logits, but router.json's rule {rule.kind!r} "
            f"for {known.label_count} classes reads {expected}",
            "write the score rule that the head was trained with",
        )
    return known
