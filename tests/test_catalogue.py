"""The catalogues say what the programs have, no more and no less."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from docs.catalogue import CHART_SCHEMA, SETTINGS, chart_schema, metrics_page, settings_page
from tests.services.running import House, asking, refusal, solution

ROOT = Path(__file__).resolve().parent.parent

SHOWN = """\
# HELP arbitrage_things_total Things.
# TYPE arbitrage_things_total counter
arbitrage_things_total{kind="b"} 0.0
arbitrage_things_total{kind="a"} 0.0
"""


def counts(house: House) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Returns what the orchestrator counts, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for metric in house.telemetry.registry.collect()
        if metric.name.startswith("arbitrage_") and metric.type in {"counter", "histogram"}
        for sample in metric.samples
    }


def test_every_setting_is_in_the_catalogue_as_it_is() -> None:
    assert SETTINGS.read_text() == settings_page(), "run `make catalogue`"


def test_the_chart_takes_the_settings_that_programs_have_and_no_others() -> None:
    assert CHART_SCHEMA.read_text() == chart_schema(), "run `make catalogue`"
    schema = json.loads(chart_schema())
    for name, program in (("target", "Generator"), ("prm", "Prm"), ("defaults", "Every")):
        [_, own] = schema["properties"][name]["allOf"]
        assert own["properties"]["settings"] == {"$ref": f"#/definitions/settingsOf{program}"}
    assert "ENGINE_URL" in schema["definitions"]["settingsOfGenerator"]["properties"]
    assert "ENGINE_URL" not in schema["definitions"]["settingsOfOrchestrator"]["properties"]


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in settings_page().splitlines() if line.startswith("| `ARBITRAGE_")]
    assert len(rows) > 40
    assert all(row.split(" | ")[3].removesuffix(" |").strip() for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_metric_of_running_programs_is_in_the_catalogue_and_no_other() -> None:
    command = [sys.executable, "-m", "docs.catalogue", "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_a_metric_has_one_row_with_its_labels_and_programs() -> None:
    page = metrics_page({"draft": SHOWN, "prm": SHOWN, "router": ""})
    assert page.splitlines()[-1] == (
        "| `arbitrage_things_total` | counter | `kind`: a, b | draft, prm | Things. |"
    )


def test_a_metric_that_means_two_things_is_refused() -> None:
    with pytest.raises(ValueError, match="arbitrage_things_total of prm"):
        metrics_page({"draft": SHOWN, "prm": SHOWN.replace(" Things.", " Others.")})


async def test_whatever_an_orchestrator_counts_is_there_at_0_from_the_start() -> None:
    house = House()
    async with house.open() as stub:
        before = counts(house)
        for policy in ("arbitrage", "rsd", "oracle", "target_only", "draft_only"):
            request = asking()
            getattr(request, policy).SetInParent()
            await solution(stub, request)
        await refusal(stub, asking(problem=" "))
        after = counts(house)
    assert set(before.values()) == {0.0}
    assert before.keys() == after.keys()
    assert after["arbitrage_steps_total", (("degraded", "false"), ("source", "target"))] > 0
