"""Turns decoded tokens into the text of one step and sees where it ends. It knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from arbitrage.core.steps import SEPARATOR

_HALF_CHARACTER = "\ufffd"


# The bytes of a character's start; as many tokens at most hold a character that is not whole.
_LONGEST_HALF = 3


def split_step(text: str, *, is_continuation: bool = False) -> tuple[str, bool]:
    """Returns the first step of `text`, and whether a separator closes it.

    Newlines and blank steps before it are skipped, what follows its separator is dropped. In a
    continuation of a step that was cut they belong to the text, so that the parts join to it.

    >>> split_step("\\n\\n1 + 1 = 2\\n\\nSo")
    ('1 + 1 = 2', True)
    >>> split_step("1 + 1\\n= 2\\n")
    ('1 + 1\\n= 2\\n', False)
    >>> split_step("\\n\\n1 + 1 = 2\\n\\nSo", is_continuation=True)
    ('\\n\\n1 + 1 = 2', True)
    """
    if is_continuation:
        blank_count = len(text) - len(text.lstrip())
        end = text.find(SEPARATOR, blank_count)
        return (text, False) if end < 0 else (text[:end], True)
    body = text.lstrip("\n")
    while (end := body.find(SEPARATOR)) >= 0:
        if body[:end].strip():
            return body[:end], True
        body = body[end:].lstrip("\n")
    return body, False


class PieceText:
    """Collects the text of a step as it comes in pieces, and hands out what is sure of it."""

    def __init__(self, *, is_continuation: bool = False) -> None:
        self._is_continuation = is_continuation
        self._text = ""
        self._sent = ""

    @property
    def text(self) -> str:
        """All that has come, what does not belong to the step included."""
        return self._text

    @property
    def is_closed(self) -> bool:
        """Whether the step's separator is complete."""
        return self._split()[1]

    def add(self, text: str) -> None:
        """Adds what comes next."""
        self._text += text

    def rewind(self, length: int) -> None:
        """Takes back what came behind the first `length` characters."""
        self._text = self._text[:length]

    def drop_half_character(self) -> None:
        """Takes back a last character that is not whole; what comes next writes it."""
        self._text = self._text.rstrip(_HALF_CHARACTER)

    def take_delta(self) -> str:
        """Returns the text since the last call that nothing to come can change or take back."""
        body, is_closed = self._split()
        if not is_closed:
            # A newline at the end may be the first half of the separator, and a blank start is
            # skipped if a separator follows. A server may send half a character as U+FFFD.
            body = body.rstrip("\n" + _HALF_CHARACTER) if body.strip() else ""
        return self._unsent(body)

    def finish(self) -> tuple[str, str]:
        """Returns the step's text and what of it no delta has carried yet."""
        body, _ = self._split()
        return body, self._unsent(body)

    def _split(self) -> tuple[str, bool]:
        return split_step(self._text, is_continuation=self._is_continuation)

    def _unsent(self, body: str) -> str:
        # What was sent cannot be taken back; a text that goes another way has nothing to add.
        if not body.startswith(self._sent):
            return ""
        delta = body[len(self._sent) :]
        self._sent += delta
        return delta


class StepText:
    """Collects the tokens of a step.

    Text is decoded when somebody needs it: at tokens that hold a newline, for a delta, and at the
    end. So a step that nobody watches costs one or two calls of the tokenizer.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        contains_newline: Callable[[int], bool],
        *,
        is_continuation: bool = False,
    ) -> None:
        self._decode = decode
        self._contains_newline = contains_newline
        self._pieces = PieceText(is_continuation=is_continuation)
        self._token_ids: list[int] = []
        # Ids before `_anchor` are never decoded again. Those up to `_read` are, as context: some
        # tokenizers write a token differently at the start of a text.
        self._anchor = 0
        self._read = 0
        self._is_half = False

    def push(self, token_id: int) -> bool:
        """Adds a token, and returns whether the step's separator is complete."""
        self._token_ids.append(token_id)
        if not (self._is_half or self._contains_newline(token_id)):
            return False
        self._catch_up()
        return self._pieces.is_closed

    def take_delta(self) -> str:
        """Returns the text since the last call that no later token can change or take back."""
        self._catch_up()
        return self._pieces.take_delta()

    def finish(self, *, is_cut: bool = False) -> tuple[str, str]:
        """Returns the step's text and what of it no delta has carried yet.

        A step that is cut ends before a character that is not whole: the next one writes it.
        """
        if is_cut:
            self._drop_half_character()
        self._catch_up(is_last=True)
        return self._pieces.finish()

    def _drop_half_character(self) -> None:
        pending = self._token_ids[self._anchor :]
        for count in range(_LONGEST_HALF + 1):
            whole = len(self._token_ids) - count
            if whole < self._read:
                return
            if not self._decode(pending[: len(pending) - count]).endswith(_HALF_CHARACTER):
                del self._token_ids[whole:]
                return

    def _catch_up(self, *, is_last: bool = False) -> None:
        if self._read == len(self._token_ids):
            return
        known = self._decode(self._token_ids[self._anchor : self._read])
        text = self._decode(self._token_ids[self._anchor :])
        self._is_half = text.endswith(_HALF_CHARACTER)
        if self._is_half and not is_last:
            return
        self._pieces.add(text[len(known) :])
        self._anchor, self._read = self._read, len(self._token_ids)
