"""Everything that is read in one process.

Each boundary has one kind of error; another one, a hang, or a message nobody can read is a
finding.
"""

from __future__ import annotations

from pathlib import Path

from tests.load.answers import answers
from tests.load.driver import Boundary
from tests.load.model_files import model_files
from tests.load.operator_inputs import inputs
from tests.load.training_files import training_files


def readers(folder: Path) -> list[Boundary]:
    """Returns the boundaries; files are written to `folder`."""
    return [*answers(), *inputs(), *model_files(folder), *training_files(folder)]
