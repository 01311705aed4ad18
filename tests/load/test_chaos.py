"""The short form of the chaos run: every kind of fault once, on real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nothing_is_lost_while_parts_of_the_system_are_killed_and_paused(tmp_path: Path) -> None:
    written = tmp_path / "chaos.json"
    faults = "kill target-0,kill router,kill draft,kill redis,kill orchestrator-0,pause target-1"
    options = ["--requests", "72", "--targets", "2", "--resumed", "2", "--faults", faults]
    run = subprocess.run(
        [sys.executable, "-m", "tests.load.chaos", *options, "--json", str(written)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    claims = json.loads(written.read_text())["claims"]
    assert len(claims) == 6
    assert all(claim["holds"] for claim in claims)
