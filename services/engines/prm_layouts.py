"""Where a process reward model judges each step: problem and steps as token ids and positions.

Positions are counted while the ids are put together, never looked for afterwards: a step may hold
the very tokens that close a step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.engines.tokenization import PieceTokenizer


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A sequence's token ids, and for each step the position of the token it is judged at."""

    tokens: list[int]
    positions: list[int]


class PrmLayout(Protocol):
    """Writes problem and steps as a family's model was taught to read them."""

    def pieces(self, problem: str, steps: Sequence[str]) -> Sequence[str]:
        """Returns the texts that are tokenised, for a look at how long they are."""
        ...

    async def lay_out(self, problem: str, steps: Sequence[str]) -> LaidOut:
        """Returns the ids of the problem and its steps, of which there is at least one."""
        ...


@dataclass(frozen=True, slots=True)
class ClosedSteps:
    """The problem, then each step tokenised by itself and closed by the same ids.

    A step is judged at the last id that closes it. `head` writes the problem. With `opens_in_head`
    the first step goes on in the same text as the head, as it does where that is a chat.
    """

    tokenizer: PieceTokenizer
    start_ids: tuple[int, ...]
    close_ids: tuple[int, ...]
    head: Callable[[str], str]
    opens_in_head: bool = False

    def pieces(self, problem: str, steps: Sequence[str]) -> Sequence[str]:
        """Returns the head and the steps."""
        if self.opens_in_head:
            return (self.head(problem) + steps[0], *steps[1:])
        return (self.head(problem), *steps)

    async def lay_out(self, problem: str, steps: Sequence[str]) -> LaidOut:
        """Returns the ids, each step's with those that close it."""
        pieces = await self.tokenizer.encode_each_async(self.pieces(problem, steps))
        tokens, positions = list(self.start_ids), []
        if not self.opens_in_head:
            tokens += pieces.pop(0)
        for ids in pieces:
            tokens += (*ids, *self.close_ids)
            positions.append(len(tokens) - 1)
        return LaidOut(tokens, positions)


@dataclass(frozen=True, slots=True)
class MarkedText:
    """One text: the problem, a space, and the steps in lines that each end in `mark`.

    It is tokenised as a whole, as tokenizers that put a space before every text require; a step is
    judged at the token in which its mark ends.
    """

    tokenizer: PieceTokenizer
    mark: str

    def pieces(self, problem: str, steps: Sequence[str]) -> Sequence[str]:
        """Returns the one text."""
        return (f"{problem} " + "\n".join(step + self.mark for step in steps),)

    async def lay_out(self, problem: str, steps: Sequence[str]) -> LaidOut:
        """Returns the ids of the text."""
        (text,) = self.pieces(problem, steps)
        ids, ends = await asyncio.to_thread(self.tokenizer.encode_with_ends, text)
        start = list(self.tokenizer.start_ids)
        # The character at which each mark ends is at the same time where its token does.
        end, at, positions = len(problem) + 1, 0, []
        for step in steps:
            end += len(step) + len(self.mark)
            while ends[at] < end:
                at += 1
            positions.append(len(start) + at)
            end += 1  # the line's end
        return LaidOut(start + ids, positions)
