"""Turns text into token ids and back, the same way for every engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from functools import lru_cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

# Together they bound what is remembered to tens of megabytes: an id takes about 36 bytes.
_CACHED_PIECES = 1024
_LONGEST_CACHED_PIECE = 2_000  # characters
_LONGEST_INLINE_TEXT = 8_192  # characters; about a millisecond of tokenising


class PieceTokenizer:
    """Tokenises pieces of text one by one, without special tokens, and remembers recent ones.

    It works on the `tokenizers` object itself: that one may be used from several threads at once,
    and its decoding leaves spaces as they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TypeError(f"{type(tokenizer).__name__} is not backed by a tokenizer.json")
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._longest_token = max(map(len, backend.get_vocab()), default=1)
        self.start_ids = self._start_ids(tokenizer)
        self.start_text = self._backend.decode(self.start_ids, skip_special_tokens=False)
        self._remembered = lru_cache(_CACHED_PIECES)(self._encode)
        self.contains_newline = lru_cache(None)(self._contains_newline)

    def encode(self, piece: str) -> tuple[int, ...]:
        """Returns the ids of one piece."""
        if len(piece) > _LONGEST_CACHED_PIECE:
            return self._encode(piece)
        return self._remembered(piece)

    def encode_all(self, pieces: Iterable[str]) -> list[int]:
        """Returns the ids of the pieces, one after the other."""
        return [token_id for piece in pieces for token_id in self.encode(piece)]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Returns the ids of a text, and for each the character of the text at which it ends."""
        (encoded,) = self._backend.encode_batch([text], add_special_tokens=False)
        return encoded.ids, [end for _, end in encoded.offsets]

    async def encode_each_async(self, pieces: Sequence[str]) -> list[tuple[int, ...]]:
        """Returns the ids of each piece, without holding up the event loop on a long text."""
        if sum(map(len, pieces)) > _LONGEST_INLINE_TEXT:
            return await asyncio.to_thread(lambda: [self.encode(piece) for piece in pieces])
        return [self.encode(piece) for piece in pieces]

    def least_token_count(self, pieces: Iterable[str]) -> int:
        """Returns how many tokens the pieces have at least, without tokenising them.

        Megabytes that cannot fit a context are refused by it before they cost seconds.
        """
        return sum(map(len, pieces)) // self._longest_token

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of ids; half a character becomes U+FFFD, special tokens nothing."""
        return self._backend.decode(token_ids, skip_special_tokens=True)

    def _encode(self, piece: str) -> tuple[int, ...]:
        if len(piece) > _LONGEST_INLINE_TEXT:
            # Unlike `encode`, this lets other threads run meanwhile, and it is faster.
            return tuple(self._backend.encode_batch_fast([piece], add_special_tokens=False)[0].ids)
        return tuple(self._backend.encode(piece, add_special_tokens=False).ids)

    def _contains_newline(self, token_id: int) -> bool:
        return "\n" in self.decode([token_id])

    def _start_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        # Whether a tokenizer adds a bos is spread over its config, class and post-processor;
        # what it does to a text is the one answer that holds. BERT's kind calls it cls.
        first = self._backend.encode("a", add_special_tokens=True).ids[:1]
        known = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
        return tuple(first) if known.issuperset(first) else ()
