"""Why a command ends early, and the exit code that says so.

0 done · 1 failed · 2 wrong usage or bad input · 130 interrupted · 143 terminated
"""

from __future__ import annotations

from arbitrage.core.errors import ArbitrageError, InvalidRequest
from services.engines.pack_manifest import PackError

FAILED = 1
BAD_INPUT = 2
SIGNAL_BASE = 128


class CommandError(Exception):
    """A command cannot go on. The message is one line for the person at the terminal.

    `details` are lines that help to find the cause, such as the end of a service's log.
    """

    exit_code = FAILED

    def __init__(self, message: str, details: tuple[str, ...] = ()) -> None:
        self.details = details
        super().__init__(message)


class BadInput(CommandError):
    """What the person asked for cannot be done as asked."""

    exit_code = BAD_INPUT


def exit_code_of(error: CommandError | ArbitrageError | PackError) -> int:
    """Returns the exit code for an error that a command ended with."""
    match error:
        case CommandError():
            return error.exit_code
        case InvalidRequest() | PackError():
            return BAD_INPUT
        case _:
            return FAILED


def message_of(error: CommandError | ArbitrageError | PackError) -> str:
    """Returns the line that tells the error, with its reason where the API gave one."""
    match error:
        case ArbitrageError():
            return f"{error} [{error.reason}]"
        case _:
            return str(error)
