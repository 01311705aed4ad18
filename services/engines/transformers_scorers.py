"""Judges steps with classifiers of transformers: a process reward model and a router."""

from __future__ import annotations

from dataclasses import replace

from arbitrage.core.errors import ContextTooLong
from arbitrage.core.ports import RouterDescription
from arbitrage.core.steps import SEPARATOR, ModelIdentity, Score, Source, Step, Trajectory
from services.engines.base import Advantage, EngineStats, StepScores
from services.engines.encoder import EncoderModel
from services.engines.encoder_reader import EncoderReader
from services.engines.loading import LoadedModel, ModelLoadError
from services.engines.prm_families import find_family
from services.engines.prm_readings import separator_ids
from services.engines.router_format import FormatError, RouterFormat, read_router_format
from services.engines.router_input import CandidateTooLong, router_pieces, router_tokens
from services.engines.scheduler import EngineOptions
from services.engines.sequence_reader import SequenceReader, refuse_longer


class TransformersPrm:
    """Implements `PrmEngine` over a process reward model of a known family.

    The family says how problem and steps are written, and reads a step's score from the logits at
    the position where the step is judged. `family` names it; without, the checkpoint tells.
    """

    def __init__(
        self, loaded: LoadedModel, options: EngineOptions | None = None, family: str | None = None
    ) -> None:
        found = find_family(loaded.folder, loaded.reference, family)
        reading, head = found.fit(loaded)
        self.family = found.name
        self._layout = reading.layout
        self._rule = reading.rule
        self._identity = loaded.identity
        self._tokenizer = loaded.tokenizer
        self._reader = SequenceReader(replace(loaded, head=head.logits), options, "prm")

    @property
    def identity(self) -> ModelIdentity:
        """Names the weights."""
        return self._identity

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
        texts = [step.text for step in steps]
        pieces = self._layout.pieces(problem, texts)
        refuse_longer(self._tokenizer.least_token_count(pieces), self.max_context_tokens)
        laid_out = await self._layout.lay_out(problem, texts)
        reading = await self._reader.read(laid_out.tokens, laid_out.positions[skip_count:])
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
        self._separator_id = separator_ids(loaded.tokenizer, loaded.reference, SEPARATOR)[-1]
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
        return self._format.description(self._identity)

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
