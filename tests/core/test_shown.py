"""Whatever an input holds, the message about it is one short line."""

from __future__ import annotations

from typing import Any

import pytest

from arbitrage.core.errors import FieldInvalid
from arbitrage.core.shown import one_line, shown


def nested(depth: int) -> list[Any]:
    """Returns lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", ["two\nlines", "\x1b[2J", "x" * 10**6, 10**4000, nested(900), {"a\r": [b"\n" * 9]}]
)
def test_a_value_is_shown_on_one_short_line(value: object) -> None:
    text = shown(value)
    assert text.isprintable()
    assert 0 < len(text) < 400


def test_an_ordinary_text_is_shown_as_it_is() -> None:
    assert (one_line("ŷ is 0.5 👍"), shown("ten"), shown(-7)) == ("ŷ is 0.5 👍", "'ten'", "-7")


def test_an_errors_value_cannot_break_its_line() -> None:
    error = FieldInvalid("policy", "none\nERROR forged", "is no policy", "give one")
    assert str(error) == "policy: is no policy, got none\\nERROR forged; give one"
