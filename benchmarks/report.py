"""Turns the committed results into the README's table: `python -m benchmarks.report [--check]`.

The table stands between two markers and is written by this program alone; `--check` fails when it
is not what the result files say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def markdown(results: list[dict[str, Any]]) -> str:
    """Returns one table for each result, a row per claim."""
    parts = []
    for result in results:
        machine = result["machine"]
        parts.append(
            f"`{result['command']}` · {machine['cpu']}, {machine['cores']} cores · "
            f"{result['date']} · commit {result['commit']}\n\n"
            "| shown | measured | 95 % interval | bar | holds |\n|---|---|---|---|---|"
        )
        for claim in result["claims"]:
            interval = claim["interval"]
            shown = "" if interval is None else f"{interval[0]:g} … {interval[1]:g}"
            holds = "yes" if claim["holds"] else "**no**"
            measured = f"{claim['value']:g} {claim['unit']}".strip()
            parts[-1] += f"\n| {claim['name']} | {measured} | {shown} | {claim['bar']} | {holds} |"
    return "\n\n".join(parts)


def with_results(readme: str, table: str) -> str:
    """Returns the README with `table` between the markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md: expected one {BEGIN} and one {END}; put them back")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    results = [json.loads(path.read_text()) for path in sorted(Path(RESULTS).glob("*.json"))]
    readme = README.read_text()
    fresh = with_results(readme, markdown(results))
    if fresh == readme:
        return 0
    if check:
        sys.stderr.write(
            "README.md does not say what benchmarks/results says; run this without --check\n"
        )
        return 1
    README.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
