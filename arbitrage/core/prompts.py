"""The exact text models see.

The router service and the training job both build their input here and nowhere else, so a
router meets in production what it was trained on. Pieces are tokenised one by one and their ids
joined: the ids of a prefix never change when a step is added, which is what lets an engine reuse
the keys and values it has computed for it.
"""

from __future__ import annotations

from collections.abc import Iterable

from arbitrage.core.steps import SEPARATOR, Source, Step, StopReason, Trajectory

_WRITER = {Source.DRAFT: "Model 0: ", Source.TARGET: "Model 1: "}


def generator_pieces(trajectory: Trajectory) -> tuple[str, ...]:
    """Returns the prompt of a plain causal model: the problem, then each step and its separator.

    A step that was cut by its token cap is not closed: the next one continues its text.
    """
    pieces = [trajectory.problem + "\n"]
    for step in trajectory.steps:
        pieces.append(step.text)
        if step.stop_reason is not StopReason.STEP_LENGTH:
            pieces.append(SEPARATOR)
    return tuple(pieces)


def router_steps(
    history: Iterable[Step], candidate: str, *, annotated: bool = True
) -> tuple[str, ...]:
    """Returns the texts of a router's input after the problem, the candidate last.

    With `annotated`, each is preceded by the model that wrote it. A separator closes each.

    >>> done = [Step("abc", Source.TARGET), Step("abc", Source.TARGET)]
    >>> router_steps(done, "abc")
    ('Model 1: abc', 'Model 1: abc', 'Model 0: abc')
    """
    texts = [(_WRITER[step.source] if annotated else "") + step.text for step in history]
    texts.append((_WRITER[Source.DRAFT] if annotated else "") + candidate)
    return tuple(texts)


def problem_text(problem: str) -> str:
    """Returns what stands before the first step of a scorer's input.

    >>> problem_text("1 + 1?")
    '1 + 1?\\n'
    """
    return problem + "\n"
