"""The only place that writes to the terminal: results to standard output, the rest to the other.

On a terminal there is colour and moving progress; elsewhere, or with NO_COLOR, plain lines.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from arbitrage.core.shown import one_line

_PLAIN_WIDTH = 500
_LONGEST_ERROR = 2_000


class Advance(Protocol):
    """Moves a progress display on."""

    def __call__(self, count: int = 1, line: str = "") -> None:
        """Counts `count` more units; `line` says the same where there is no moving display."""
        ...


class Terminal:
    """Standard output and standard error of one command."""

    def __init__(self) -> None:
        self._out = _console(stderr=False)
        self._err = _console(stderr=True)

    def show(self, content: RenderableType) -> None:
        """Writes a result; long lines are left to the terminal to wrap."""
        self._out.print(content, soft_wrap=isinstance(content, str | Text))

    def write_json(self, line: str) -> None:
        """Writes a result for programs, on one line and at once."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def note(self, text: str | Text) -> None:
        """Writes what is going on."""
        self._err.print(text, soft_wrap=True)

    def error(self, message: str, details: tuple[str, ...] = ()) -> None:
        """Writes why the command ends, after the lines that help to find the cause."""
        for line in details:
            self._err.print(Text(f"  │ {line}", "dim"), soft_wrap=True)
        # It may quote what was typed, or what a server said.
        line = one_line(message, _LONGEST_ERROR)
        self._err.print(Text.assemble(("arbitrage: ", "bold red"), line), soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: int, unit_divisor: int = 1) -> Iterator[Advance]:
        """Shows how far work of `total` units is; yields what moves it on.

        `unit_divisor` scales what is shown, such as bytes to MiB.
        """
        if self._err.is_terminal and not self._err.no_color:
            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._err,
                transient=True,
            )
            with bar:
                task = bar.add_task(label, total=total // unit_divisor)

                def move(count: int = 1, line: str = "") -> None:
                    bar.advance(task, count / unit_divisor)

                yield move
        else:

            def tell(count: int = 1, line: str = "") -> None:
                if line:
                    self.note(line)

            yield tell


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    plain = not stream.isatty() or bool(os.environ.get("NO_COLOR"))
    return Console(
        stderr=stderr,
        highlight=False,
        markup=False,
        emoji=False,
        no_color=plain,
        # A pipe has no width; tables must not be cut to 80 columns there.
        width=_PLAIN_WIDTH if not stream.isatty() else None,
    )
