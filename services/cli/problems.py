"""Held-out problems that a pack carries, and when an answer counts as right."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from services.cli.failures import BadInput
from services.engines.pack_manifest import PROBLEMS_NAME, CorruptPack, Pack

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class BundledProblem:
    """A problem no model of the pack was trained on, with the answer it should come to."""

    problem_id: str
    text: str
    answer: str


def bundled_problems(pack: Pack, count: int) -> tuple[BundledProblem, ...]:
    """Returns the pack's first `count` problems.

    Raises:
        BadInput: the pack has fewer, or none.
        CorruptPack: a line is not a problem.
    """
    path = pack.folder / PROBLEMS_NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise BadInput(
            f"pack {pack.name!r} has no {PROBLEMS_NAME}; choose another with --pack"
        ) from None
    if not 1 <= count <= len(lines):
        raise BadInput(
            f"--problems: must be from 1 to the {len(lines)} of pack {pack.name!r}, got {count}"
        )
    try:
        rows = [json.loads(line) for line in lines[:count]]
        return tuple(
            BundledProblem(str(row["id"]), str(row["problem"]), str(row["answer"])) for row in rows
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptPack(f"{path}: a line is not a problem: {error!r}") from None


def is_solved(solution_text: str, answer: str) -> bool:
    r"""Tells whether the last boxed value of a solution is the answer.

    >>> is_solved("14 + 8 = 22.\n\nThe answer is \\boxed{22}.", "22")
    True
    >>> is_solved("14 + 8 = 22.", "22")
    False
    """
    boxed = _BOXED.findall(solution_text)
    return bool(boxed) and boxed[-1].strip() == answer.strip()
