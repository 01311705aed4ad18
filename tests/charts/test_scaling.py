"""Autoscalers: one query in one place, and the number of replicas is theirs alone."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.cases import CASES
from tests.charts.rendering import (
    COMPONENTS,
    NAMESPACE,
    Object,
    notes,
    of_kind,
    rendered,
)
from tests.charts.tools import KUBECTL, ROOT

pytestmark = pytest.mark.deploy

KEDA = {"mode": "keda", "keda": {"serverAddress": "http://prometheus:9090"}}
PIN = f'{{namespace="{NAMESPACE}",release="try"}}'
LOAD = f"sum(arbitrage_target_inflight_steps{PIN}) + sum(arbitrage_target_queue_depth{PIN})"
SOLUTIONS = f"sum(arbitrage_solutions_running{PIN}) + sum(arbitrage_solutions_waiting{PIN})"


def scaled(mode: dict[str, Any], *names: str) -> list[Object]:
    """Returns the objects of a release whose components have an autoscaler."""
    return rendered({name: {"autoscaling": mode} for name in names or COMPONENTS})


def target(objects: list[Object], kind: str) -> Object:
    """Returns the target's object of a kind."""
    return of_kind(objects, kind)["try-arbitrage-target"]


def applied(live: Object, rendered_anew: Object, folder: Path) -> Object:
    """Returns what is left of an object in a cluster when another is applied to it, by kubectl."""
    path = folder / "live.json"
    path.write_text(json.dumps(live))
    patch = ("--type", "strategic", "--patch", json.dumps(rendered_anew))
    command = [
        str(KUBECTL),
        "patch",
        "--local",
        "--filename",
        str(path),
        *patch,
        "--output",
        "json",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found: Object = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("mode", [{"mode": "hpa"}, KEDA], ids=["hpa", "keda"])
def test_an_upgrade_under_an_autoscaler_leaves_replicas_alone(
    mode: dict[str, Any], tmp_path: Path
) -> None:
    before = of_kind(scaled(mode), "Deployment")
    values = {name: {"autoscaling": mode, "replicas": 7} for name in COMPONENTS}
    after = of_kind(rendered({**values, "image": {"tag": "next"}}), "Deployment")
    for name, deployment in after.items():
        # What neither of the two says was not given up by the upgrade either.
        assert "replicas" not in before[name]["spec"]
        live = {**before[name], "spec": {**before[name]["spec"], "replicas": 3}}
        found = applied(live, deployment, tmp_path)["spec"]
        assert found["template"]["spec"]["containers"][0]["image"].endswith(":next")
        assert found["replicas"] == 3


def test_without_an_autoscaler_the_number_is_that_of_the_values() -> None:
    objects = rendered({"target": {"replicas": 3}})
    assert target(objects, "Deployment")["spec"]["replicas"] == 3
    assert not of_kind(objects, "HorizontalPodAutoscaler") | of_kind(objects, "ScaledObject")


@pytest.mark.parametrize(
    ("mode", "kind"), [("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")]
)
def test_each_component_has_one_autoscaler_at_most_and_it_names_its_deployment(
    mode: str, kind: str
) -> None:
    objects = scaled({**KEDA, "mode": mode})
    found = of_kind(objects, kind)
    assert found.keys() == of_kind(objects, "Deployment").keys()
    for name, scaler in found.items():
        assert scaler["spec"]["scaleTargetRef"]["name"] == name
    both = of_kind(objects, "HorizontalPodAutoscaler").keys() & of_kind(objects, "ScaledObject")
    assert both == set()


def test_keda_asks_for_one_series_and_keeps_replicas_where_there_is_no_answer() -> None:
    spec = target(scaled(KEDA, "target"), "ScaledObject")["spec"]
    demand, load = spec["triggers"]
    assert load["metadata"]["query"] == LOAD
    assert demand["metadata"]["query"] == f"sum(arbitrage_target_demand_seconds{PIN})"
    for trigger in (demand, load):
        assert trigger["type"] == "prometheus"
        assert trigger["metricType"] == "AverageValue"
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert trigger["metadata"]["threshold"] == "32"
    assert spec["fallback"] == {
        "failureThreshold": 3,
        "replicas": 1,
        "behavior": "currentReplicasIfHigher",
    }


def test_what_else_is_scaled_goes_by_the_solutions_that_run_and_wait() -> None:
    found = of_kind(scaled(KEDA), "ScaledObject")
    for name in COMPONENTS:
        if name != "target":
            [trigger] = found[f"try-arbitrage-{name}"]["spec"]["triggers"]
            assert trigger["metadata"]["query"] == SOLUTIONS


def test_up_at_once_and_down_one_by_one_after_a_window() -> None:
    hpa = target(scaled({"mode": "hpa"}, "target"), "HorizontalPodAutoscaler")["spec"]["behavior"]
    config = target(scaled(KEDA, "target"), "ScaledObject")["spec"]["advanced"]
    assert config["horizontalPodAutoscalerConfig"]["behavior"] == hpa
    assert hpa["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert hpa["scaleDown"]["stabilizationWindowSeconds"] == 300
    assert hpa["scaleDown"]["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 60}]


def test_scale_to_zero_is_kedas_and_comes_back_with_the_first_step() -> None:
    spec = target(scaled({**KEDA, "minReplicas": 0}, "target"), "ScaledObject")["spec"]
    assert spec["minReplicaCount"] == 0
    assert spec["fallback"]["replicas"] == 1
    assert {one["metadata"]["activationThreshold"] for one in spec["triggers"]} == {"0"}


def test_an_hpa_goes_by_external_metrics_of_this_release() -> None:
    metrics = target(scaled({"mode": "hpa"}, "target"), "HorizontalPodAutoscaler")["spec"][
        "metrics"
    ]
    assert [metric["external"]["metric"] for metric in metrics] == [
        {"name": f"arbitrage_target_{what}", "selector": {"matchLabels": {"release": "try"}}}
        for what in ("demand", "load")
    ]
    assert {metric["external"]["target"]["type"] for metric in metrics} == {"AverageValue"}


def test_an_hpa_may_go_by_a_metric_of_the_pods() -> None:
    hpa = {"metricType": "Pods", "metricName": "arbitrage_engine_running_requests"}
    found = target(scaled({"mode": "hpa", "hpa": hpa}, "target"), "HorizontalPodAutoscaler")
    [metric] = found["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "arbitrage_engine_running_requests"


def test_rules_record_what_an_hpa_goes_by_and_under_the_labels_that_it_asks_for() -> None:
    values = {
        "target": {"autoscaling": {"mode": "hpa"}},
        "metrics": {"prometheusRule": {"enabled": True}},
    }
    [rule] = of_kind(rendered(values), "PrometheusRule").values()
    records = {
        one["record"]: one
        for group in rule["spec"]["groups"]
        for one in group["rules"]
        if "record" in one
    }
    assert records["arbitrage:target_load:sum"]["expr"] == LOAD
    assert records["arbitrage:target_load:sum"]["labels"] == {
        "namespace": NAMESPACE,
        "release": "try",
    }
    assert {f"arbitrage:{name}_load:sum" for name in COMPONENTS} <= records.keys()


def test_every_series_gets_the_labels_that_queries_are_pinned_to() -> None:
    objects = rendered({"metrics": {"serviceMonitor": {"enabled": True}}})
    monitors = of_kind(objects, "ServiceMonitor")
    assert len(monitors) == len(COMPONENTS)
    services = of_kind(objects, "Service").values()
    for name, monitor in monitors.items():
        [endpoint] = monitor["spec"]["endpoints"]
        given = {rule["targetLabel"]: rule["replacement"] for rule in endpoint["relabelings"]}
        assert given == {"release": "try", "component": name.removeprefix("try-arbitrage-")}
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        chosen = [one for one in services if wanted <= one["metadata"]["labels"].items()]
        # Through two Services each pod would be counted twice.
        assert [one["metadata"]["name"] for one in chosen] == [name]


def test_notes_warn_of_an_autoscaler_that_nothing_is_scraped_for() -> None:
    values = {"target": {"autoscaling": KEDA}}
    warning = "WARNING: target.autoscaling.mode is keda, but metrics.serviceMonitor"
    assert warning in notes(values)
    assert warning not in notes({**values, "metrics": {"serviceMonitor": {"enabled": True}}})


def test_notes_say_what_to_do_next() -> None:
    told = notes()
    assert "helm test try" in told
    assert "arbitrage ask --address localhost:50050" in told
    assert "WARNING" not in told


def test_only_one_of_several_pods_may_be_missing_at_once() -> None:
    objects = scaled(KEDA, "target")
    budget = target(objects, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert "try-arbitrage-prm" not in of_kind(objects, "PodDisruptionBudget")


def test_metrics_of_queries_dashboards_and_alerts_are_in_the_catalogue() -> None:
    catalogue = (ROOT / "docs" / "metrics.md").read_text()
    known = set(re.findall(r"^\| `(\w+)`", catalogue, re.MULTILINE))
    histograms = set(re.findall(r"^\| `(\w+)` \| histogram", catalogue, re.MULTILINE))
    known |= {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    values, *files = CASES["paper-vllm"]
    text = yaml.safe_dump_all(
        one
        for one in rendered(values, *files)
        if one["kind"] in {"ScaledObject", "PrometheusRule", "ConfigMap"}
    )
    used = set(re.findall(r"\b(arbitrage_\w+|process_\w+)", text))
    assert len(used) > 15
    assert used - known == set()
