"""A text becomes the same ids however it is asked for, and a long one leaves nothing behind."""

from __future__ import annotations

from services.engines.tokenization import PieceTokenizer
from tests.services.engine_models import byte_tokenizer


async def test_long_and_short_pieces_become_the_same_ids_in_a_thread_and_here() -> None:
    tokenizer = PieceTokenizer(byte_tokenizer())
    pieces = ("ab", "x" * 20_000, "", "\n\n")

    together = await tokenizer.encode_each_async(pieces)

    assert together == [tokenizer.encode(piece) for piece in pieces]
    assert await tokenizer.encode_each_async(pieces[::2]) == together[::2]
    assert tokenizer.encode_all(pieces) == [i for ids in together for i in ids]


def test_a_long_piece_is_not_remembered() -> None:
    tokenizer = PieceTokenizer(byte_tokenizer())

    tokenizer.encode("x" * 2_001)
    before = tokenizer._remembered.cache_info().currsize
    tokenizer.encode("x" * 2_000)

    assert (before, tokenizer._remembered.cache_info().currsize) == (0, 1)
