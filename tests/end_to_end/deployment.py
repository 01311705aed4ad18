"""The `arbitrage` command as a person runs it, with the shipped models."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

COMMAND = [sys.executable, "-m", "services.cli"]
PROBLEM = (
    "Ann owns 14. Bob has 8 more than Ann. Cat has 3 times as many as Bob. "
    "How many pens does Cat have?"
)


@dataclass(frozen=True)
class Up:
    """A running `arbitrage up`: its process, its services by name, where to ask, its logs."""

    process: subprocess.Popen[str]
    services: dict[str, psutil.Process]
    addresses: dict[str, str]
    run_folder: Path

    @property
    def address(self) -> str:
        """Where the orchestrator listens."""
        return self.addresses["orchestrator"]

    def wait_for_log(self, service: str, text: str, timeout_s: float = 10.0) -> None:
        """Returns once a service has written `text` to its log."""
        deadline_s = time.monotonic() + timeout_s
        while text not in (self.run_folder / f"{service}.log").read_text():
            assert time.monotonic() < deadline_s, f"{service} never wrote {text!r}"
            time.sleep(0.02)

    def orphans_after(self, seconds: float) -> list[psutil.Process]:
        """Returns the services that are still there after at most that time."""
        _, alive = psutil.wait_procs(self.services.values(), timeout=seconds)
        return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def running_up(run_folder: Path, *options: str, count: int = 6) -> Iterator[Up]:
    """Starts `count` services on free ports and, whatever a test does, leaves nothing behind."""
    process = subprocess.Popen(
        [*COMMAND, "up", "--ports", "any", "--run-folder", str(run_folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    services: dict[str, psutil.Process] = {}
    try:
        assert process.stdout is not None
        addresses: dict[str, str] = {}
        for line in process.stdout:
            row = re.match(r"(\w+) +(\S+:\d+) +http://\S+/metrics +(\d+)$", line.rstrip())
            if row:
                services[row[1]] = psutil.Process(int(row[3]))
                addresses[row[1]] = row[2]
            if line.startswith("Ready."):
                break
        else:
            assert process.stderr is not None
            raise AssertionError(f"up did not start: {process.stderr.read()}")
        assert len(services) == count
        yield Up(process, services, addresses, run_folder)
    finally:
        process.kill()
        process.communicate()
        for service in services.values():
            if service.is_running():
                service.kill()


def wait_for_exit(process: subprocess.Popen[str], timeout_s: float = 40.0) -> tuple[int, str]:
    """Returns the exit code and what went to standard error."""
    _, errors = process.communicate(timeout=timeout_s)
    return process.returncode, errors
