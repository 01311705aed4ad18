"""A step ends at its separator, however tokens cut it, and deltas join to its text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engines.step_text import StepText, split_step
from services.engines.tokenization import PieceTokenizer
from tests.services.engine_models import byte_tokenizer

_BYTES = PieceTokenizer(byte_tokenizer(()))


class _Pieces:
    """A vocabulary of given texts: token i is the text at i."""

    def __init__(self, *pieces: str) -> None:
        self._pieces = pieces

    def step_text(self) -> StepText:
        return StepText(self._decode, lambda i: "\n" in self._pieces[i])

    def _decode(self, token_ids: object) -> str:
        assert isinstance(token_ids, list)
        return "".join(self._pieces[i] for i in token_ids)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (("a", "\n\n"), "a"),
        (("a", "\n", "\n"), "a"),
        (("a", ".\n\n"), "a."),
        (("a", ".\n\nSo"), "a."),
        (("a\n", "\nb"), "a"),
        (("\n\n", "a", "\n\n"), "a"),
        (("\n", "\n\n", " a", "\n\n\n"), " a"),
        ((" ", "\n\n", "a\n\n"), "a"),
        (("a\nb", "\n\n"), "a\nb"),
    ],
)
def test_the_separator_is_seen_however_tokens_cut_it(pieces: tuple[str, ...], text: str) -> None:
    step = _Pieces(*pieces).step_text()

    closed = [step.push(i) for i in range(len(pieces))]

    assert closed == [False] * (len(pieces) - 1) + [True]
    assert step.finish()[0] == text


def test_leading_separators_are_no_step() -> None:
    step = _Pieces("\n\n", "\n", " ").step_text()

    assert [step.push(i) for i in (0, 1, 0, 2, 0)] == [False] * 5
    assert step.finish()[0].strip() == ""


def test_an_unfinished_separator_is_held_back_until_it_is_text() -> None:
    step = _Pieces("a", "\n", "b").step_text()
    deltas = []
    for i in range(3):
        step.push(i)
        deltas.append(step.take_delta())

    assert deltas == ["a", "", "\nb"]


def test_no_delta_holds_half_a_character() -> None:
    step = StepText(_BYTES.decode, _BYTES.contains_newline)
    deltas = []
    for token_id in _BYTES.encode("5 €é🙂"):
        step.push(token_id)
        deltas.append(step.take_delta())

    assert [delta for delta in deltas if delta] == ["5", " ", "€", "é", "🙂"]


def test_a_separator_is_seen_in_a_token_that_ends_in_half_a_character() -> None:
    pieces = (b"a", b"\n\n\xe2", b"\x82\xac")
    step = StepText(
        lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"),
        lambda i: b"\n" in pieces[i],
    )

    assert [step.push(i) for i in range(3)] == [False, False, True]
    assert step.finish()[0] == "a"


def test_bytes_that_are_no_character_are_kept_as_such() -> None:
    step = StepText(_BYTES.decode, _BYTES.contains_newline)
    euro = _BYTES.encode("€")
    step.push(*_BYTES.encode("a"))
    sent = step.take_delta()
    for token_id in euro[:2]:
        step.push(token_id)
    held = step.take_delta()
    text, rest = step.finish()

    assert (sent, held) == ("a", "")
    assert text == sent + rest == _BYTES.decode([*_BYTES.encode("a"), *euro[:2]])


def _parts(text: str, cap: int, *, watched: bool) -> list[str]:
    """Returns the parts of a step that is cut after every `cap` tokens and goes on from there.

    Like a model, it goes on with what follows the text that is kept, not the tokens written.
    """
    parts: list[str] = []
    whole = text.encode()
    while True:
        kept = "".join(parts).encode()
        assert whole.startswith(kept)
        step = StepText(_BYTES.decode, _BYTES.contains_newline, is_continuation=bool(parts))
        token_ids = _BYTES.encode(text)[len(kept) :]
        deltas: list[str] = []
        closed = False
        for token_id in token_ids[:cap]:
            if closed := step.push(token_id):
                break
            if watched:
                deltas.append(step.take_delta())
        body, rest = step.finish(is_cut=not closed)
        assert not watched or "".join(deltas) + rest == body
        parts.append(body)
        if closed or len(token_ids) <= cap:
            return parts


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("cap", range(4, 12))
@pytest.mark.parametrize("text", ["abc\n\nde", "a\nb €🙂é🙂🙂 x", "abcd\n\nef\n\ngh", "abc\n\n\nd"])
def test_parts_of_a_cut_step_join_to_the_text(text: str, cap: int, *, watched: bool) -> None:
    parts = _parts(text, cap, watched=watched)

    assert all(parts)
    assert text.startswith("".join(parts))
    if not text[len("".join(parts)) :].startswith("\n\n"):
        assert "".join(parts) == text


def test_a_separator_cut_in_two_is_whole_in_the_joined_text() -> None:
    first = _Pieces("abc", "\n").step_text()
    second = StepText(_BYTES.decode, _BYTES.contains_newline, is_continuation=True)
    first.push(0)
    first.push(1)

    closed = [second.push(i) for i in _BYTES.encode("\nde\n\n")]

    assert first.finish(is_cut=True)[0] + second.finish()[0] == "abc\n\nde"
    assert closed == [False, False, False, False, True]


def test_bytes_that_never_become_a_character_are_kept_though_cut() -> None:
    step = StepText(_BYTES.decode, _BYTES.contains_newline)
    half = _BYTES.encode("€")[1]
    for token_id in (*_BYTES.encode("a"), *[half] * 6):
        step.push(token_id)

    assert step.finish(is_cut=True)[0] == "a" + "\ufffd" * 6


@given(text=st.text(st.sampled_from("ab .\n€🙂"), max_size=30))
def test_deltas_join_to_the_text_that_is_there_without_them(text: str) -> None:
    watched = StepText(_BYTES.decode, _BYTES.contains_newline)
    unwatched = StepText(_BYTES.decode, _BYTES.contains_newline)
    deltas = []
    closed = False
    for token_id in _BYTES.encode(text):
        closed = watched.push(token_id)
        assert unwatched.push(token_id) is closed
        if closed:
            break
        deltas.append(watched.take_delta())
    whole, rest = watched.finish()

    assert "".join(deltas) + rest == whole == unwatched.finish()[0] == split_step(text)[0]
    assert closed is split_step(text)[1]
