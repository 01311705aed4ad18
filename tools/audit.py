"""`python -m tools.audit`: are the installed packages the pinned ones, and is one known as unsafe?

The first question needs no network: what is installed without a pin, or at another version, is not
what was tested. The second is put to the advisory service by pip-audit; where the service cannot
be reached that is said in one line, and is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
# The project itself, and what a new virtual environment is born with.
_UNPINNED = frozenset({"arbitrage", "pip", "setuptools", "wheel"})
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Advice:
    """What the advisory service knows: one line per vulnerability, and who it was not asked of.

    `unreached` says why there is no answer; None where there is one.
    """

    vulnerabilities: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    unreached: str | None = None


def pins_of(constraints: str) -> dict[str, Requirement]:
    """Returns the pins of a constraints file by canonical name.

    >>> str(pins_of("# why\\nPy_Arrow==26.0.1\\n")["py-arrow"].specifier)
    '==26.0.1'
    """
    lines = (line.partition("#")[0].strip() for line in constraints.splitlines())
    pins = (Requirement(line) for line in lines if line)
    return {
        canonicalize_name(pin.name): pin
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def deviations(installed: Mapping[str, str], pins: Mapping[str, Requirement]) -> list[str]:
    """Returns a line for each installed package that is not pinned, or not at its pin.

    A build of the pinned version, such as 2.13.0+cpu, is at it.

    >>> deviations({"numpy": "2.4.5", "torch": "2.13.0+cpu", "new": "1"},
    ...            pins_of("numpy==2.4.6\\ntorch==2.13.0"))
    ['new 1: has no pin in constraints.txt', 'numpy 2.4.5: constraints.txt says ==2.4.6']
    """
    found = []
    for name, version in sorted(installed.items()):
        pin = pins.get(name)
        if name in _UNPINNED:
            continue
        if pin is None:
            found.append(f"{name} {version}: has no pin in constraints.txt")
        elif [part.operator for part in pin.specifier] != ["=="]:
            found.append(f"{name}: constraints.txt says {pin}, which is no exact version")
        elif not pin.specifier.contains(version, prereleases=True):
            found.append(f"{name} {version}: constraints.txt says {pin.specifier}")
    return found


def advice_of(written: str, complaint: str) -> Advice:
    """Returns what pip-audit's JSON says; `complaint` is what it wrote to standard error.

    pip-audit calls a package that the service does not answer about "skipped", and ends well. So an
    answer about nothing is no answer.
    """
    try:
        dependencies = json.loads(written)["dependencies"]
    except (ValueError, KeyError):
        return Advice(unreached=(complaint.strip().splitlines() or ["it wrote nothing"])[-1])
    skipped = tuple(found["name"] for found in dependencies if "skip_reason" in found)
    if len(skipped) == len(dependencies):
        return Advice(unreached=f"no answer about any of {len(dependencies)} packages")
    return Advice(
        tuple(
            f"{found['name']} {found['version']}: {hole['id']}, mended in "
            f"{', '.join(hole['fix_versions']) or 'no version yet'}"
            for found in dependencies
            for hole in found.get("vulns", ())
        ),
        skipped,
    )


def ask_advisories() -> Advice:
    """Runs pip-audit over the constraints."""
    command = [
        *(sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS)),
        *("--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Advice(unreached=f"no answer within {_TIMEOUT_S:g} s")
    return advice_of(done.stdout, done.stderr)


def audit(
    installed: Mapping[str, str], constraints: str, ask: Callable[[], Advice] = ask_advisories
) -> tuple[int, list[str]]:
    """Returns the exit code and what there is to say."""
    lines = deviations(installed, pins_of(constraints))
    advice = ask()
    lines += advice.vulnerabilities
    exit_code = 1 if lines else 0
    if advice.unreached is not None:
        lines.append(f"known vulnerabilities were not looked for: {advice.unreached}")
    elif advice.skipped:
        lines.append(f"the advisory service knows nothing of {', '.join(advice.skipped)}")
    return exit_code, lines


def main() -> int:
    """Audits this environment."""
    installed: dict[str, str] = {
        canonicalize_name(found.metadata["Name"]): found.version for found in distributions()
    }
    exit_code, lines = audit(installed, CONSTRAINTS.read_text(encoding="utf-8"))
    for line in lines:
        sys.stdout.write(f"audit: {line}\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
