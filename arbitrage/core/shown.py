"""Shows values in messages that people read: on one line, and no longer than a log can bear.

What is wrong with an input is told with the input, which may hold megabytes, lists in lists, line
breaks, or what moves a terminal's cursor.
"""

from __future__ import annotations

import reprlib


def one_line(text: str, limit: int = 80) -> str:
    r"""Returns the text with what cannot be printed escaped, cut behind `limit` characters.

    >>> one_line("two\nlines")
    'two\\nlines'
    >>> one_line("12345", limit=3)
    '123… (5 characters)'
    """
    kept = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return kept if len(text) <= limit else f"{kept}… ({len(text)} characters)"


def shown(value: object, limit: int = 80) -> str:
    """Returns a value as code would write it, shortened wherever it is long or deep.

    >>> shown("ten"), shown([1, [2, [3, [4]]]])
    ("'ten'", '[1, [2, [3, [...]]]]')
    """
    shortener = reprlib.Repr()
    shortener.maxlevel = 4
    shortener.maxstring = shortener.maxother = shortener.maxlong = limit
    return one_line(shortener.repr(value), 4 * limit)
