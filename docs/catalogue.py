"""Writes the catalogues of metrics and settings; with `--check`, compares them with the code.

Metrics are read from `/metrics` of a deployment that is started for it, settings from their
classes. What is said of each stands beside it in the code. The names of settings go into the
chart's schema too, so that Helm refuses one that is misspelt.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from pydantic.fields import FieldInfo

from services.cli.fleet import running_fleet
from services.cli.plan import ANY_PORTS, GATEWAY, MODEL_ROLES, ORCHESTRATOR, FleetPlan
from services.engines.packs import find_pack
from services.gateway.settings import GatewaySettings
from services.generator.settings import GeneratorSettings
from services.orchestrator.settings import OrchestratorSettings
from services.prm.settings import PrmSettings
from services.router.settings import RouterSettings
from services.rpc.model_program import ModelSettings
from services.rpc.settings import ServerSettings, variable_of
from tests.services.redis_servers import redis_server

METRICS: Final = Path(__file__).with_name("metrics.md")
SETTINGS: Final = Path(__file__).with_name("settings.md")
CHART_SCHEMA: Final = (
    Path(__file__).resolve().parent.parent / "charts" / "arbitrage" / "values.schema.json"
)
_PROGRAMS: Final = (ORCHESTRATOR, *MODEL_ROLES, GATEWAY)
_MADE: Final = "<!-- Made by `python -m docs.catalogue`; change the code and run it again. -->\n"
# Labels whose values are a deployment's own.
_OPEN_LABELS: Final = frozenset({"revision"})
_OF_BUCKETS: Final = frozenset({"le", "quantile"})
_START_TIMEOUT_S: Final = 300.0

_METRICS_INTRO: Final = f"""\
{_MADE}
# Metrics

Every program serves its own on `/metrics` of `ARBITRAGE_METRICS_PORT`. A label has the values
given here and no others, and each of its series is there from the start, counters at 0; a label
without values here names what a deployment has.

"""
_SETTINGS_INTRO: Final = f"""\
{_MADE}
# Settings

Programs read them from the environment. One that is unknown, missing or bad stops the program
with exit code 2 and a line that names it.
"""
_SECTIONS: Final[tuple[tuple[str, type[ServerSettings], type[ServerSettings] | None], ...]] = (
    ("Every program", ServerSettings, None),
    ("Every program that runs a model", ModelSettings, ServerSettings),
    ("orchestrator", OrchestratorSettings, ServerSettings),
    ("generator: draft and target", GeneratorSettings, ModelSettings),
    ("prm", PrmSettings, ModelSettings),
    ("router", RouterSettings, ModelSettings),
    ("gateway", GatewaySettings, ServerSettings),
)
# The definitions of the chart's schema that hold the names of a program's settings.
_DEFINITIONS: Final[Mapping[str, type[ServerSettings]]] = {
    "settingsOfEvery": ServerSettings,
    "settingsOfOrchestrator": OrchestratorSettings,
    "settingsOfGenerator": GeneratorSettings,
    "settingsOfPrm": PrmSettings,
    "settingsOfRouter": RouterSettings,
    "settingsOfGateway": GatewaySettings,
}


@dataclass
class Entry:
    """One metric, as the programs that have it show it."""

    kind: str
    meaning: str
    programs: list[str] = field(default_factory=list)
    labels: dict[str, set[str]] = field(default_factory=dict)


def metrics_page(exposed: Mapping[str, str]) -> str:
    """Returns the catalogue of what programs show, given the text of `/metrics` by program."""
    entries: dict[str, Entry] = {}
    for program, text in exposed.items():
        for metric in text_string_to_metric_families(text):
            name = f"{metric.name}_total" if metric.type == "counter" else metric.name
            entry = entries.setdefault(name, Entry(metric.type, metric.documentation))
            if (entry.kind, entry.meaning) != (metric.type, metric.documentation):
                raise ValueError(f"{name} of {program} is not what other programs mean by it")
            entry.programs.append(program)
            _add_labels(entry, metric)
    rows = (
        (
            f"`{name}`",
            entry.kind,
            "; ".join(_label(label, values) for label, values in sorted(entry.labels.items())),
            "all" if len(entry.programs) == len(exposed) else ", ".join(entry.programs),
            entry.meaning,
        )
        for name, entry in sorted(entries.items())
    )
    return _METRICS_INTRO + _table(("metric", "type", "labels", "programs", "meaning"), rows)


def settings_page() -> str:
    """Returns the catalogue of every setting of every program."""
    sections = []
    for title, kind, base in _SECTIONS:
        schema = kind.model_json_schema()
        known = {} if base is None else base.model_json_schema()["properties"]
        rows = (
            (
                f"`{variable_of(name)}`",
                _type(rule, schema.get("$defs", {})),
                _default(kind.model_fields[name], rule, is_program=base is not None),
                kind.model_fields[name].description or "",
            )
            for name, rule in schema["properties"].items()
            if known.get(name) != rule
        )
        told = inspect.cleandoc(kind.__doc__ or "")
        table = _table(("variable", "type", "default", "meaning"), rows)
        sections.append(f"\n## {title}\n\n{told}\n\n{table}")
    return _SETTINGS_INTRO + "".join(sections)


def chart_schema() -> str:
    """Returns the schema of the chart's values with the names of every program's settings."""
    schema = json.loads(CHART_SCHEMA.read_text())
    for name, kind in _DEFINITIONS.items():
        known = (variable_of(field).removeprefix("ARBITRAGE_") for field in kind.model_fields)
        schema["definitions"][name] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {setting: {"$ref": "#/definitions/setting"} for setting in known},
        }
    return json.dumps(schema, indent=2) + "\n"


def exposed_metrics() -> dict[str, str]:
    """Starts every program with everything turned on, and returns what each shows at first."""
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as redis:
        everything = {
            "ARBITRAGE_STORE_URL": redis.url,
            "ARBITRAGE_FEEDBACK_FOLDER": folder,
            "ARBITRAGE_FEEDBACK_SAMPLE_RATE": "0.01",
        }
        extra = {ORCHESTRATOR: everything}
        plan = FleetPlan(find_pack("tiny"), ANY_PORTS, extra=extra, has_gateway=True)
        return asyncio.run(_exposed_by(plan, Path(folder)))


async def _exposed_by(plan: FleetPlan, folder: Path) -> dict[str, str]:
    async with running_fleet(plan, folder, start_timeout_s=_START_TIMEOUT_S) as fleet:
        return {
            name: await asyncio.to_thread(_read, fleet.services[name].metrics_port)
            for name in _PROGRAMS
        }


def _read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return str(answer.read().decode())


def _add_labels(entry: Entry, metric: Metric) -> None:
    for sample in metric.samples:
        for label, value in sample.labels.items():
            if label not in _OF_BUCKETS:
                entry.labels.setdefault(label, set()).add(value)


def _label(label: str, values: Iterable[str]) -> str:
    return f"`{label}`" if label in _OPEN_LABELS else f"`{label}`: {', '.join(sorted(values))}"


def _type(rule: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "anyOf" in rule:
        return " or ".join(
            _type(choice, definitions) for choice in rule["anyOf"] if choice.get("type") != "null"
        )
    if "$ref" in rule:
        return _type(definitions[rule["$ref"].rsplit("/", 1)[1]], definitions)
    if "enum" in rule:
        return ", ".join(f"`{value}`" for value in rule["enum"])
    match rule["type"]:
        case "integer" | "number" as kind:
            return ", ".join((kind, *_bounds(rule)))
        case "boolean":
            return "`true`, `false`"
        case "array":
            return "texts with commas between them"
        case _:
            return {"path": "path", "password": "secret text"}.get(rule.get("format", ""), "text")


def _bounds(rule: Mapping[str, Any]) -> Iterable[str]:
    for key, words in (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
    ):
        if key in rule:
            yield f"{words} {rule[key]:g}"


def _default(setting: FieldInfo, rule: Mapping[str, Any], *, is_program: bool) -> str:
    if setting.is_required():
        return "needed" if is_program else "the program's own"
    value = rule["default"]
    if value is None or value == []:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    is_check = parser.parse_args().check
    pages = {
        METRICS: metrics_page(exposed_metrics()),
        SETTINGS: settings_page(),
        CHART_SCHEMA: chart_schema(),
    }
    stale = [
        path.name for path, text in pages.items() if not path.exists() or path.read_text() != text
    ]
    if is_check and stale:
        sys.stderr.write(f"not what the code says: {', '.join(stale)}; run `make catalogue`\n")
        return 1
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
