"""Bounds of a request, and the check that a caller's wishes stay within the server's."""

from __future__ import annotations

from dataclasses import dataclass

from arbitrage.core.errors import BudgetOutOfRange, ProblemEmpty, ProblemTooLarge


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bounds of one request.

    `max_tokens` bounds the tokens of the solution, `max_step_tokens` those of one step;
    `max_target_steps` the steps the target may write (None: no bound); `time_limit_s` the whole
    (None: no bound).
    """

    max_steps: int = 32
    max_tokens: int = 2048
    max_step_tokens: int = 256
    max_target_steps: int | None = None
    time_limit_s: float | None = None


DEFAULT_BUDGETS = Budgets()


@dataclass(frozen=True, slots=True)
class Caps:
    """The most a caller may ask of this server."""

    max_steps: int = 256
    max_tokens: int = 32_768
    max_step_tokens: int = 4_096
    time_limit_s: float = 3_600.0
    max_problem_bytes: int = 262_144


def check_problem(problem: str, caps: Caps) -> None:
    """Refuses a problem without text, or longer than the cap in UTF-8 bytes.

    Raises:
        ProblemEmpty, ProblemTooLarge
    """
    if not problem.strip():
        raise ProblemEmpty("problem", repr(problem), "must hold text", "send the question to solve")
    size = len(problem.encode("utf-8"))
    if size > caps.max_problem_bytes:
        raise ProblemTooLarge(
            "problem",
            f"{size} bytes",
            f"must be at most {caps.max_problem_bytes} bytes",
            "shorten it, or raise ARBITRAGE_MAX_PROBLEM_BYTES on the orchestrator",
        )


def check_budgets(budgets: Budgets, caps: Caps) -> None:
    """Refuses a budget that is not positive or is above the server's cap.

    Raises:
        BudgetOutOfRange
    """
    _check_count("budgets.max_steps", budgets.max_steps, 1, caps.max_steps)
    _check_count("budgets.max_tokens", budgets.max_tokens, 1, caps.max_tokens)
    _check_count("budgets.max_step_tokens", budgets.max_step_tokens, 1, caps.max_step_tokens)
    if budgets.max_target_steps is not None:
        _check_count("budgets.max_target_steps", budgets.max_target_steps, 0, caps.max_steps)
    time_limit_s = budgets.time_limit_s
    if time_limit_s is not None and not 0.0 < time_limit_s <= caps.time_limit_s:
        raise BudgetOutOfRange(
            "budgets.time_limit",
            f"{time_limit_s} s",
            f"must be above 0 s and at most {caps.time_limit_s:g} s",
            "give a time in that range or leave it out",
        )


def _check_count(field: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise BudgetOutOfRange(
            field,
            value,
            f"must be between {least} and {most}",
            "give a number in that range or leave it out",
        )
