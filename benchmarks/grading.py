"""Whether a solution comes to the right answer, by math-verify.

math-verify bounds its time by the alarm signal, so this has to be called in the main thread.
"""

from __future__ import annotations

from math_verify import parse, verify

_TIMEOUT_S = 5


def is_right(solution_text: str, answer: str) -> bool:
    r"""Whether the last answer in a text, boxed or not, equals `answer` as mathematics does.

    >>> is_right("so \\boxed{\\frac{1}{2}}.", "0.5"), is_right("The answer is 18 dollars.", "18")
    (True, True)
    >>> is_right("so \\boxed{3}.", "4"), is_right("I do not know.", "4"), is_right("", "4")
    (False, False, False)
    """
    # Where several are boxed, the last is meant.
    before, boxed, after = solution_text.rpartition("\\boxed")
    solution_text = boxed + after if boxed else before + after
    expected = parse(f"\\boxed{{{answer}}}", parsing_timeout=_TIMEOUT_S)
    found = parse(solution_text, parsing_timeout=_TIMEOUT_S)
    return bool(verify(expected, found, timeout_seconds=_TIMEOUT_S))
