"""Alerts fire when they should and only then, by promtool; each has its entry in the runbook."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.rendering import CHART, NAMESPACE, of_kind, rendered
from tests.charts.tools import ROOT, promtool

pytestmark = pytest.mark.deploy

VALUES: dict[str, Any] = {
    "target": {
        "autoscaling": {
            "mode": "keda",
            "maxReplicas": 4,
            "loadPerReplica": 10,
            "keda": {"serverAddress": "http://prometheus:9090"},
        }
    },
    "metrics": {"prometheusRule": {"enabled": True}, "dashboard": {"enabled": True}},
}
ALERTS = {
    "AutoscalerInert",
    "EmptyMetric",
    "AtMaxReplicas",
    "TargetDegraded",
    "RouterDrift",
    "CacheDown",
    "ErrorBudget",
}
IN = f'namespace="{NAMESPACE}",release="try",pod="o-0"'
READY = f'arbitrage_pool_replicas{{{IN},role="target",state="ready"}}'


def rule_file(folder: Path, values: dict[str, Any] = VALUES) -> Path:
    """Writes the rules as Prometheus reads them, and returns the file."""
    [rule] = of_kind(rendered(values), "PrometheusRule").values()
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    return path


def fired(folder: Path, alert: str, series: dict[str, str], at: str) -> bool:
    """Says whether an alert fires at a time, with these series every minute."""
    # Nothing is expected; what fired nevertheless is in what promtool prints.
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": value} for name, value in series.items()],
        "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": []}],
    }
    test = {"rule_files": [str(rule_file(folder))], "evaluation_interval": "1m", "tests": [case]}
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump(test))
    command = [str(promtool()), "test", "rules", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        assert f'Labels:{{alertname="{alert}"' in run.stdout + run.stderr, run.stdout + run.stderr
    return run.returncode != 0


def load(inflight: str, queued: str = "0x60", ready: str = "1x60") -> dict[str, str]:
    """Returns series of an orchestrator with so many steps, for an hour."""
    return {
        f"arbitrage_target_inflight_steps{{{IN}}}": inflight,
        f"arbitrage_target_queue_depth{{{IN}}}": queued,
        READY: ready,
    }


def steps(kept: str, degraded: str) -> dict[str, str]:
    """Returns counts of steps."""
    name = f'arbitrage_steps_total{{{IN},source="draft",degraded='
    return {f'{name}"false"}}': kept, f'{name}"true"}}': degraded}


def calls(good: str, bad: str) -> dict[str, str]:
    """Returns counts of solutions."""
    name = f'arbitrage_rpc_requests_total{{{IN},method="GenerateSolution",code='
    return {f'{name}"OK"}}': good, f'{name}"UNAVAILABLE"}}': bad}


def drift(value: str, records: str) -> dict[str, str]:
    """Returns a router's drift, and how much it rests on."""
    return {
        f"arbitrage_router_drift{{{IN}}}": value,
        f'arbitrage_feedback_records_total{{{IN},result="written"}}': records,
    }


CASES: list[tuple[str, bool, dict[str, str], str]] = [
    ("AutoscalerInert", True, load("16x60"), "25m"),
    ("AutoscalerInert", False, load("16x60"), "5m"),
    ("AutoscalerInert", False, load("12x60"), "25m"),
    ("AutoscalerInert", False, load("16x60", ready="1x18 2x40"), "25m"),
    ("AutoscalerInert", False, load("90x60", ready="4x60"), "25m"),
    ("EmptyMetric", True, {READY: "1x60"}, "5m"),
    ("EmptyMetric", False, load("0x60"), "5m"),
    ("EmptyMetric", True, {f"arbitrage_target_inflight_steps{{{IN}}}": "1x60"}, "5m"),
    ("AtMaxReplicas", True, load("41x60", ready="4x60"), "20m"),
    ("AtMaxReplicas", True, load("0x60", queued="41x60", ready="4x60"), "20m"),
    ("AtMaxReplicas", False, load("39x60", ready="4x60"), "20m"),
    ("AtMaxReplicas", False, load("41x60", ready="3x60"), "20m"),
    ("TargetDegraded", True, steps("0+90x60", "0+10x60"), "15m"),
    ("TargetDegraded", False, steps("0+96x60", "0+4x60"), "15m"),
    ("TargetDegraded", False, steps("0x60", "0x60"), "15m"),
    ("RouterDrift", True, drift("0.2x500", "0+2x500"), "400m"),
    ("RouterDrift", True, drift("-0.2x500", "0+2x500"), "400m"),
    ("RouterDrift", False, drift("0.1x500", "0+2x500"), "400m"),
    ("RouterDrift", False, drift("0.2x500", "0x500"), "400m"),
    ("CacheDown", True, {f"arbitrage_store_up{{{IN}}}": "1x5 0x50"}, "10m"),
    ("CacheDown", False, {f"arbitrage_store_up{{{IN}}}": "1x60"}, "10m"),
    ("ErrorBudget", True, calls("0+90x120", "0+10x120"), "70m"),
    ("ErrorBudget", False, calls("0+95x120", "0+5x120"), "70m"),
    ("ErrorBudget", False, calls("0+100x120", "0+50x60 3000x60"), "110m"),
    # One call, and it fails.
    ("ErrorBudget", False, calls("0x120", "0x30 1x90"), "33m"),
    ("ErrorBudget", True, calls("0x120", "0x30 9x90"), "33m"),
]


@pytest.mark.parametrize(("alert", "fires", "series", "at"), CASES)
def test_an_alert_fires_when_it_should_and_only_then(
    tmp_path: Path, alert: str, fires: bool, series: dict[str, str], at: str
) -> None:
    assert fired(tmp_path, alert, series, at) is fires


def test_a_gateways_alerts_count_gateways(tmp_path: Path) -> None:
    gateway = {"gateway": VALUES["target"]}
    groups = yaml.safe_load(rule_file(tmp_path, {**VALUES, **gateway}).read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    found = {
        rule["alert"]: rule["expr"]
        for rule in rules
        if rule.get("labels", {}).get("component") == "gateway"
    }
    for alert in ("AutoscalerInert", "AtMaxReplicas"):
        own = f'count(arbitrage_http_seconds_count{{namespace="{NAMESPACE}",release="try",route='
        assert own in found[alert]
        assert "count(arbitrage_solutions_running" not in found[alert]


def test_a_model_that_loads_slowly_is_no_sleeping_autoscaler(tmp_path: Path) -> None:
    slow = {"probes": {"startup": {"periodSeconds": 10, "failureThreshold": 180}}}
    values = {**VALUES, "target": {**VALUES["target"], **slow}}
    groups = yaml.safe_load(rule_file(tmp_path, values).read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    [inert] = [rule for rule in rules if rule.get("alert") == "AutoscalerInert"]
    assert inert["for"] == "35m"


def test_another_release_raises_no_alert_here(tmp_path: Path) -> None:
    other = {name.replace('"try"', '"other"'): value for name, value in load("41x60").items()}
    assert not fired(tmp_path, "AutoscalerInert", {**other, **load("1x60")}, "25m")


def test_promtool_finds_nothing_wrong_with_the_rules(tmp_path: Path) -> None:
    command = [str(promtool()), "check", "rules", str(rule_file(tmp_path))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_has_cases_that_fire_and_that_do_not(tmp_path: Path) -> None:
    groups = yaml.safe_load(rule_file(tmp_path).read_text())["groups"]
    found = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    assert found == ALERTS
    for fires in (True, False):
        assert {alert for alert, expected, *_ in CASES if expected is fires} == ALERTS


def test_every_alert_has_its_entry_in_the_runbook(tmp_path: Path) -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    groups = yaml.safe_load(rule_file(tmp_path).read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert {rule["alert"] for rule in rules} <= set(headings)
    for rule in rules:
        url = rule["annotations"]["runbook_url"]
        assert url.endswith(f"docs/runbook.md#{rule['alert'].lower()}")


def test_without_redis_nobody_is_woken_for_it() -> None:
    values = {**VALUES, "redis": {"mode": "none"}}
    assert "CacheDown" not in json.dumps(of_kind(rendered(values), "PrometheusRule"))


def test_the_dashboard_is_shipped_as_it_is() -> None:
    found = of_kind(rendered(VALUES), "ConfigMap")["try-arbitrage-dashboards"]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    [(name, text)] = found["data"].items()
    assert json.loads(text) == json.loads((CHART / "dashboards" / name).read_text())


def test_every_panel_asks_what_prometheus_understands(tmp_path: Path) -> None:
    board = json.loads((CHART / "dashboards" / "arbitrage.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    rules = []
    for panel in panels:
        assert panel["description"]
        for target in panel["targets"]:
            assert 'namespace="$namespace",release="$release"' in target["expr"]
            query = target["expr"].replace("$__rate_interval", "1m")
            rules.append({"record": f"panel:{panel['id']}:{target['refId']}", "expr": query})
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    command = [str(promtool()), "check", "rules", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_dashboard_answers_what_operators_ask() -> None:
    board = json.loads((CHART / "dashboards" / "arbitrage.json").read_text())
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert rows == [
        "Is it fast?",
        "Is it good?",
        "Is it saving?",
        "Is anything degraded?",
        "Is the router still right?",
        "Does the target follow the load?",
    ]
