"""Builds a router's input from its pieces, for the service and the training job alike."""

from __future__ import annotations

from collections.abc import Sequence

from arbitrage.core.prompts import problem_text, router_steps
from arbitrage.core.steps import Trajectory


class CandidateTooLong(ValueError):
    """Problem and candidate alone do not fit the context."""

    def __init__(self, problem_count: int, candidate_count: int) -> None:
        self.problem_count = problem_count
        self.candidate_count = candidate_count
        super().__init__(f"{problem_count} problem tokens and {candidate_count} candidate tokens")


def router_pieces(trajectory: Trajectory, candidate: str, *, annotated: bool) -> tuple[str, ...]:
    """Returns the texts that are tokenised one by one: the problem, the history, the candidate."""
    steps = router_steps(trajectory.steps, candidate, annotated=annotated)
    return (problem_text(trajectory.problem), *steps)


def router_tokens(
    pieces: Sequence[Sequence[int]], start_ids: Sequence[int], separator_id: int, max_tokens: int
) -> tuple[list[int], int]:
    """Returns the input's token ids, and how many of the history's were cut to fit.

    `pieces` are the ids of what `router_pieces` returns. `separator_id` closes each step. What
    does not fit is cut from the left of the history; problem and candidate are never cut.

    >>> router_tokens([[1], [2, 2], [3, 3], [4]], [], 0, 6)
    ([1, 3, 3, 0, 4, 0], 3)

    Raises:
        CandidateTooLong
    """
    problem = [*start_ids, *pieces[0]]
    candidate = [*pieces[-1], separator_id]
    history = [token for ids in pieces[1:-1] for token in (*ids, separator_id)]
    room = max_tokens - len(problem) - len(candidate)
    if room < 0:
        raise CandidateTooLong(len(problem), len(candidate))
    cut = max(0, len(history) - room)
    return problem + history[cut:] + candidate, cut
