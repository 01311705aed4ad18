"""What the Dockerfile says, as far as tests ask."""

from __future__ import annotations

import json
import re
from functools import cache

from tests.charts.tools import ROOT

PATH = ROOT / "Dockerfile"
IMAGES = ("orchestrator", "gateway", "generator", "prm", "router", "training")


@cache
def commands_of() -> dict[str, list[str]]:
    """Returns the command of each target that has one."""
    found: dict[str, list[str]] = {}
    target = ""
    for line in PATH.read_text().splitlines():
        if started := re.match(r"FROM \S+ AS (\S+)", line):
            target = started[1]
        elif line.startswith("CMD "):
            found[target] = json.loads(line.removeprefix("CMD "))
    return found
