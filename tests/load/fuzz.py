"""Tries a hundred thousand odd inputs at every border of the product.

`python -m tests.load.fuzz --inputs 100000 --seconds 480 --seed 1 --json FILE` prints a table per
boundary and ends with 1 where anything crashed, hung, or blamed the server for the caller's input.
Everything runs in this process, on the loopback interface alone.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from benchmarks.results import Bar, Claim, Result
from tests.load.driver import LONGEST_S, Boundary, Drive, Tally, end_hangs, saved
from tests.load.readers import readers
from tests.load.rpcs import fake_deployment, rpc_boundaries, tiny_deployment

# Parts of all inputs: what is read in this process, calls to fake engines, and to real ones.
_READERS_SHARE, _RPCS_SHARE, _TINY_SHARE = 0.5, 0.485, 0.015


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the whole and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs in all (%(default)s)")
    parser.add_argument("--seconds", type=float, default=480.0, help="time at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="decides every input (%(default)s)")
    parser.add_argument("--json", type=Path, help="file that gets the result")
    parser.add_argument(
        "--findings",
        type=Path,
        default=Path("build/fuzz"),
        help="folder that gets each input that was not taken as it must (%(default)s)",
    )
    asked = parser.parse_args(arguments)
    # What a server logs of requests it refuses is no part of the table.
    logging.disable(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
    end_hangs()
    started_s = time.monotonic()
    drive = Drive(asked.seed, started_s + asked.seconds, ends_hangs=True)
    tallies = _read(drive, asked.inputs) + asyncio.run(_called(drive, asked.inputs))
    result = _result(tallies, asked.inputs, asked.seed)
    print(_table(tallies))
    print(f"\n{sum(t.input_count for t in tallies)} inputs in {time.monotonic() - started_s:.0f} s")
    for tally in tallies:
        for number, finding in enumerate(tally.findings[:20]):
            path = saved(finding, asked.findings, number)
            print(f"FINDING  {tally.boundary}: {finding.trace.strip().splitlines()[-1]}: {path}")
    result.print_claims()
    if asked.json is not None:
        result.write(asked.json)
    return 0 if all(claim.as_json()["holds"] for claim in result.claims) else 1


def counts(boundaries: Sequence[Boundary], total: float) -> list[int]:
    """Returns how many inputs each boundary gets."""
    weights = sum(boundary.weight for boundary in boundaries)
    return [-int(-total * boundary.weight // weights) for boundary in boundaries]


def _read(drive: Drive, total: int) -> list[Tally]:
    with tempfile.TemporaryDirectory(prefix="arbitrage-fuzz-") as folder:
        boundaries = readers(Path(folder))
        shares = counts(boundaries, total * _READERS_SHARE)
        return [drive.run(b, count) for b, count in zip(boundaries, shares, strict=True)]


async def _called(drive: Drive, total: int) -> list[Tally]:
    tallies = []
    for deployment, name, share, concurrency in (
        (tiny_deployment, "tiny", _TINY_SHARE, 4),
        (fake_deployment, "fake", _RPCS_SHARE, 16),
    ):
        async with (
            deployment() as addresses,
            rpc_boundaries(addresses, name, concurrency) as boundaries,
        ):
            shares = counts(boundaries, total * share)
            for boundary, count in zip(boundaries, shares, strict=True):
                tallies.append(await drive.run_concurrently(boundary, count))
    return tallies


def _result(tallies: Sequence[Tally], asked_count: int, seed: int) -> Result:
    input_count = sum(tally.input_count for tally in tallies)
    findings = sum(len(tally.findings) for tally in tallies)
    slowest_s = max(tally.slowest_s for tally in tallies)
    how = "seeded odd inputs at every border, loopback only"
    return Result(
        benchmark="fuzz",
        seeds=(seed,),
        claims=(
            Claim("inputs tried", input_count, "inputs", how, 1, Bar("at least", asked_count)),
            Claim(
                "crashes, hangs and answers that blame the server",
                findings,
                "findings",
                how,
                input_count,
                Bar("at most", 0),
            ),
            Claim("slowest input", slowest_s, "s", how, input_count, Bar("at most", LONGEST_S)),
        ),
        rows=tuple(
            {
                "boundary": tally.boundary,
                "inputs": tally.input_count,
                "outcomes": dict(tally.outcomes.most_common()),
                "slowest_s": round(tally.slowest_s, 4),
                "findings": len(tally.findings),
            }
            for tally in tallies
        ),
        command=shlex.join(["python", "-m", "tests.load.fuzz", *sys.argv[1:]]),
    )


def _table(tallies: Sequence[Tally]) -> str:
    lines = [f"{'boundary':>25}  {'inputs':>6}  {'slowest':>9}  accepted, and refused by reason"]
    for tally in tallies:
        outcomes = [f"{reason} {count}" for reason, count in tally.outcomes.most_common()]
        shown = ", ".join(outcomes[:5]) + (f", {len(outcomes) - 5} more" if outcomes[5:] else "")
        slowest = f"{tally.slowest_s * 1e3:.1f} ms"
        lines.append(f"{tally.boundary:>25}  {tally.input_count:>6}  {slowest:>9}  {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
