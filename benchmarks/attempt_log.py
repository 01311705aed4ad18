"""Attempts at problems, a line of JSON for each, so that a run that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.cli.failures import BadInput


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one policy made of one question. Times in seconds; counts are of the solution."""

    question_id: str
    arm: str
    is_right: bool
    seconds: float
    steps: int
    target_steps: int
    tokens: int
    target_tokens: int
    stop_reason: str
    text: str


class AttemptLog:
    """The attempts of one run in a file. What a killed run has half written is dropped."""

    def __init__(self, path: Path, run: Mapping[str, object]) -> None:
        """Opens the log of a run, or begins one; `run` is what makes two runs the same.

        Raises:
            BadInput: the file is the log of another run.
        """
        self._path = path
        self.attempts: dict[tuple[str, str], Attempt] = {}
        whole = self._whole_lines()
        # With the first attempt, so that a run that cannot begin stands in no other's way.
        self._head = "" if whole else json.dumps(run) + "\n"
        if not whole:
            return
        if whole[0] != json.loads(json.dumps(run)):
            raise BadInput(
                f"{path}: holds attempts of another run ({json.dumps(whole[0])}); move it away, or "
                "run with the same options"
            )
        for line in whole[1:]:
            attempt = Attempt(**line)
            self.attempts[attempt.question_id, attempt.arm] = attempt
        # Beside it first: whoever is killed here loses nothing.
        rewritten = path.with_name(f"{path.name}.partial")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in whole), encoding="utf-8")
        rewritten.replace(path)

    def add(self, attempt: Attempt) -> None:
        """Keeps an attempt."""
        self.attempts[attempt.question_id, attempt.arm] = attempt
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(self._head + json.dumps(asdict(attempt)) + "\n")
        self._head = ""

    def _whole_lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            raise BadInput(f"{self._path}: is no log of attempts; move it away") from None
