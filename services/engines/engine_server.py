"""What a server that runs a language model offers, whatever its dialect."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

from arbitrage.core.steps import Sampling, StopReason

# What is drawn depends on it, and a server's own is not ours to know: some take 32 bits, and TGI
# none that is 0.
_SEEDS: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads.

    `text` as the server is to tokenise it, its start token left out where the server adds one;
    `token_ids` are all of its ids, where a tokenizer is at hand.
    """

    text: str
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Asks for the text that follows a prompt, up to the separator.

    `seed` None leaves the drawing to the server; `wants_entropy` asks for the log-probabilities
    that entropies are made of.
    """

    prompt: Prompt
    max_tokens: int
    sampling: Sampling
    seed: int | None = None
    wants_entropy: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text, as it comes. `entropies` are in nats, one a token, where the server offers them.

    `token_count` is how many tokens the piece is known to stand for.
    """

    text: str
    entropies: tuple[float, ...] = ()
    token_count: int = 1


@dataclass(frozen=True, slots=True)
class End:
    """Why the text ended: SEPARATOR, END_OF_SEQUENCE or STEP_LENGTH; and what it took.

    A server that stops at the separator has left it out of the text. Counts are None where the
    server does not tell.
    """

    stop_reason: StopReason
    token_count: int | None = None
    prompt_token_count: int | None = None
    cached_token_count: int = 0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of a model. `revision` is "" where nothing stands for its weights."""

    revision: str
    max_context_tokens: int | None


class EngineServer(Protocol):
    """A server that runs a language model."""

    async def describe(self, model: str) -> ServedModel:
        """Asks the server about `model`, and finds out what it can do.

        Raises:
            EngineSetupError: it has no such model.
            ServerError
        """
        ...

    def complete(self, completion: Completion) -> AsyncGenerator[Piece | End]:
        """Yields pieces, then one `End`, last.

        Closing the iterator stops the server's work.

        Raises:
            ServerError
        """
        ...

    async def close(self) -> None:
        """Closes the connections."""
        ...


def seed_of(sampling: Sampling, step_index: int, round_index: int) -> int | None:
    """Returns the seed of one call; each step and each call for it has another one."""
    if sampling.seed is None:
        return None
    digest = sha256(f"{sampling.seed}:{step_index}:{round_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % _SEEDS + 1


def entropy_of(logarithms: Iterable[float]) -> float:
    """Returns the entropy in nats of a distribution of which only the likeliest tokens are known.

    What is left of the probability counts as one token, so the true entropy is not lower.

    >>> round(entropy_of([math.log(0.5), math.log(0.5)]), 4)
    0.6931
    """
    known = [value for value in logarithms if value > -math.inf]
    probabilities = [min(math.exp(value), 1.0) for value in known]
    left = max(1.0 - sum(probabilities), 0.0)
    return -sum(p * math.log(p) for p in (*probabilities, left) if p > 0.0)


def digest_of(*parts: str) -> str:
    """Returns a short name for what the parts say."""
    return sha256("\0".join(parts).encode()).hexdigest()[:16]
