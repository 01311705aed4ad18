"""A text becomes the same ids however it is asked for, and a long one leaves nothing behind."""

from __future__ import annotations

import threading

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


async def test_a_long_text_lets_other_threads_run_meanwhile() -> None:
    tokenizer = PieceTokenizer(byte_tokenizer())
    text = "x" * 3_000_000
    turns, is_done = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not is_done.wait(0.001):
            turns += 1

    counting = threading.Thread(target=count)
    counting.start()
    (ids,) = await tokenizer.encode_each_async([text])
    is_done.set()
    counting.join()
    assert len(ids) == len(text)
    assert turns > 20


def test_a_text_has_at_least_as_many_tokens_as_if_all_were_the_longest() -> None:
    tokenizer = PieceTokenizer(byte_tokenizer(added=("\n\n", "word" * 5)))
    for pieces in (["word" * 50], ["ab", ""], ["x" * 99]):
        assert tokenizer.least_token_count(pieces) <= len(tokenizer.encode_all(pieces))
    assert tokenizer.least_token_count(["word" * 50]) == 10
