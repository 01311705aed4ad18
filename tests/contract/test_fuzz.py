"""Whatever arrives, at any border, is taken or refused for what it is: never with a crash.

`python -m tests.load.fuzz` is the long form of this, with a hundred thousand inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.load.driver import ACCEPTED, Boundary, Drive, Tally, Wrong
from tests.load.fuzz import counts
from tests.load.odd_values import OddValues
from tests.load.readers import readers
from tests.load.rpcs import fake_deployment, rpc_boundaries, tiny_deployment

# Time is the long form's matter: a machine that runs tests may be slow.
_LONGEST_S = 60.0


def findings(tallies: list[Tally]) -> list[tuple[str, object, str]]:
    """Returns what must not be."""
    return [(f.boundary, f.given, f.trace) for tally in tallies for f in tally.findings]


def one_sided(tallies: list[Tally]) -> list[str]:
    """Returns the boundaries that did the same with every input, which tells little."""
    return [tally.boundary for tally in tallies if len(tally.outcomes) == 1]


@pytest.mark.parametrize(
    ("deployment", "count"),
    [
        (fake_deployment, 1_500),
        pytest.param(fake_deployment, 10_000, marks=pytest.mark.slow),
        pytest.param(tiny_deployment, 500, marks=pytest.mark.slow),
    ],
)
async def test_no_bytes_are_answered_with_internal(
    deployment: Callable[[], AbstractAsyncContextManager[dict[str, str]]], count: int
) -> None:
    drive = Drive(seed=7, longest_s=_LONGEST_S)
    async with (
        deployment() as addresses,
        rpc_boundaries(addresses, "any", 8, _LONGEST_S) as boundaries,
    ):
        shares = zip(boundaries, counts(boundaries, count), strict=True)
        tallies = [await drive.run_concurrently(boundary, share) for boundary, share in shares]
    assert findings(tallies) == []
    assert one_sided(tallies) == []


@pytest.mark.parametrize("count", [4_000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_whatever_is_read_is_taken_or_refused_with_an_error_of_its_own(
    tmp_path: Path, count: int
) -> None:
    drive, boundaries = Drive(seed=7, longest_s=_LONGEST_S), readers(tmp_path)
    shares = zip(boundaries, counts(boundaries, count), strict=True)
    tallies = [drive.run(boundary, share) for boundary, share in shares]
    assert findings(tallies) == []
    # Nothing that a server says of what it can do is refused.
    assert one_sided(tallies) == ["server capabilities"]


def test_another_error_and_a_wrong_answer_are_findings() -> None:
    def attempt(number: int) -> str:
        if number == 1:
            raise KeyError(number)
        if number == 2:
            raise Wrong("the answer is wrong")
        return ACCEPTED

    tally = Drive(seed=1).run(Boundary("b", 1, lambda odd: odd.coin.randint(1, 3), attempt), 60)
    assert {finding.given for finding in tally.findings} == {1, 2}
    assert tally.input_count == 60
    assert tally.outcomes["FINDING"] + tally.outcomes[ACCEPTED] == 60


def test_equal_seeds_draw_equal_inputs(tmp_path: Path) -> None:
    for boundary in readers(tmp_path):
        first, second = OddValues("1"), OddValues("1")
        for _ in range(20):
            assert repr(boundary.draw(first)) == repr(boundary.draw(second))
