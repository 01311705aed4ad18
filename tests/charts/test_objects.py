"""What holds for every object of every example."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.gateway.settings import GatewaySettings
from services.generator.settings import GeneratorSettings
from services.orchestrator.settings import OrchestratorSettings
from services.prm.settings import PrmSettings
from services.router.settings import RouterSettings
from services.rpc.settings import ServerSettings, read_settings
from tests.charts.cases import CASES
from tests.charts.rendering import (
    CHART,
    COMPONENTS,
    EXAMPLES,
    MODELS,
    NAMESPACE,
    Object,
    containers,
    environment,
    helm,
    of_kind,
    pod_of,
    pods,
    rendered,
    sources,
)
from tests.charts.restricted import breaches
from tests.charts.schemas import VERSIONS, problems
from tests.charts.tools import ROOT

pytestmark = pytest.mark.deploy

_SETTINGS: dict[str, type[ServerSettings]] = {
    "services.orchestrator": OrchestratorSettings,
    "services.generator": GeneratorSettings,
    "services.prm": PrmSettings,
    "services.router": RouterSettings,
    "services.gateway": GatewaySettings,
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_helm_lints_every_example(example: Path) -> None:
    assert "0 chart(s) failed" in helm("lint", CHART, "--strict", "--values", example)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_object_is_one_that_its_api_takes(case: str, version: str) -> None:
    found = rendered(*CASES[case])
    assert [problem for one in found for problem in problems(one, version)] == []


def test_a_field_that_the_api_does_not_know_is_found() -> None:
    for kind in ("Deployment", "Certificate", "ScaledObject"):
        found = next(iter(of_kind(rendered(*CASES["paper-vllm"]), kind).values()))
        broken = {**found, "spec": {**found["spec"], "replicaz": 1}}
        assert problems(found, VERSIONS[0]) == []
        assert "replicaz" in problems(broken, VERSIONS[0])[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pod_keeps_the_restricted_profile(case: str) -> None:
    found = {name: breaches(pod) for name, pod in pods(rendered(*CASES[case]))}
    assert found
    assert {name: broken for name, broken in found.items() if broken} == {}


@pytest.mark.parametrize(
    ("field", "value", "breach"),
    [
        ("runAsUser", 0, "runs as no number, or as root"),
        ("runAsNonRoot", False, "may be root"),
        ("seccompProfile", {"type": "Unconfined"}, "has no seccomp profile"),
    ],
)
def test_a_pod_that_breaks_the_profile_is_found(field: str, value: Any, breach: str) -> None:
    pod = pod_of(rendered(), "draft")
    spec = {**pod["spec"], "securityContext": {**pod["spec"]["securityContext"], field: value}}
    assert breaches({**pod, "spec": spec}) == [f"draft: {breach}"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_container_says_what_memory_and_processor_it_needs(case: str) -> None:
    for name, pod in pods(rendered(*CASES[case])):
        for container in containers(pod):
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), (name, container["name"])
            assert "memory" in resources["limits"], (name, container["name"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_program_takes_what_it_is_told(case: str) -> None:
    assert len(list(read_by_programs(rendered(*CASES[case])))) > 1


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_can_be_installed_before_there_is_a_router(example: Path) -> None:
    values = {
        "router": {"enabled": False},
        "orchestrator": {"settings": {"FEEDBACK_SAMPLE_RATE": 0}},
    }
    assert len(list(read_by_programs(rendered(values, example)))) > 1


def read_by_programs(objects: list[Object]) -> Iterator[ServerSettings]:
    """Yields what each program makes of its environment; what a Secret holds is made up."""
    for _, pod in pods(objects):
        for container in containers(pod):
            command = container.get("command", [])
            if command[:2] == ["python", "-m"] and command[2] in _SETTINGS:
                told = {one["name"]: one.get("value", "redis://a") for one in container["env"]}
                yield read_settings(_SETTINGS[command[2]], told)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_name_is_given_twice(case: str) -> None:
    found = rendered(*CASES[case])
    names = Counter((one["kind"], one["metadata"]["name"]) for one in found)
    assert [name for name, count in names.items() if count > 1] == []
    for name, pod in pods(found):
        for container in containers(pod):
            given = Counter(entry["name"] for entry in container.get("env", ()))
            assert [one for one, count in given.items() if count > 1] == [], name


# What Kubernetes and KServe leave of 63 characters for what they put behind a name.
_ROOM = {"CronJob": 52, "InferenceService": 53, "StatefulSet": 52}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_names_of_a_long_release_fit_and_are_its_own(case: str) -> None:
    values, *files = CASES[case]
    # As long as Helm lets them be, and different at the very end.
    names = [
        {
            (one["kind"], one["metadata"]["name"])
            for one in rendered(values, *files, release=release)
        }
        for release in (
            f"{'arbitrage-in-production-' * 2}eu-1",
            f"{'arbitrage-in-production-' * 2}eu-2",
        )
    ]
    for kind, name in names[0]:
        assert len(name) <= _ROOM.get(kind, 63), (kind, name)
    shared = {name for kind, name in names[0] & names[1] if kind != "ConfigMap"}
    assert not shared


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whatever_is_mounted_is_a_volume_and_what_is_a_volume_is_mounted(case: str) -> None:
    for name, pod in pods(rendered(*CASES[case])):
        spec = pod["spec"]
        volumes = {volume["name"] for volume in spec.get("volumes", ())}
        mounts = {m["name"] for one in containers(pod) for m in one.get("volumeMounts", ())}
        claimed = {"data"} if name.startswith("StatefulSet/") else set()
        assert mounts - volumes <= claimed, name
        assert volumes - mounts == set(), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_an_object_refers_to_is_there(case: str) -> None:
    found = rendered(*CASES[case])
    for name, pod in pods(found):
        if account := pod["spec"].get("serviceAccountName"):
            assert account in of_kind(found, "ServiceAccount"), name
        for volume in pod["spec"].get("volumes", ()):
            if "configMap" in volume:
                assert volume["configMap"]["name"] in of_kind(found, "ConfigMap"), name
    outer = [of_kind(found, kind).values() for kind in ("Ingress", "GRPCRoute", "HTTPRoute")]
    for one in (one for objects in outer for one in objects):
        services = set(re.findall(r"'name': '(try-arbitrage-[\w-]+balanced)'", str(one["spec"])))
        assert services
        assert services <= of_kind(found, "Service").keys()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_service_selects_a_pod_with_its_ports(case: str) -> None:
    found = rendered(*CASES[case])
    for name, service in of_kind(found, "Service").items():
        selector = service["spec"]["selector"].items()
        chosen = [pod for _, pod in pods(found) if selector <= pod["metadata"]["labels"].items()]
        assert len(chosen) == 1, name
        ports = {p["name"] for one in containers(chosen[0]) for p in one.get("ports", ())}
        named = {p["targetPort"] for p in service["spec"]["ports"]}
        assert {port for port in named if isinstance(port, str)} <= ports, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_orchestrator_is_told_where_every_deployed_model_is(case: str) -> None:
    found = rendered(*CASES[case])
    told = environment(pod_of(found, "orchestrator"), "orchestrator")
    services = of_kind(found, "Service")
    for name in MODELS:
        service = services.get(f"try-arbitrage-{name}")
        if service is not None:
            assert service["spec"]["clusterIP"] == "None"
            port = service["spec"]["ports"][0]["port"]
            host = f"try-arbitrage-{name}.{NAMESPACE}.svc"
            assert told[f"ARBITRAGE_{name.upper()}_ADDRESS"] == f"{host}:{port}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pod_is_killed_only_after_its_calls_have_had_their_time(case: str) -> None:
    for name, pod in pods(rendered(*CASES[case])):
        for container in pod["spec"]["containers"]:
            if "lifecycle" not in container:
                continue
            grace = float(environment(pod, container["name"])["ARBITRAGE_SHUTDOWN_GRACE_S"])
            before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert before + grace < pod["spec"]["terminationGracePeriodSeconds"], name


def test_every_template_is_rendered_by_a_case() -> None:
    made = {name for case in CASES.values() for name in sources(*case)}
    folder = CHART / "templates"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")}
    assert made == there


def test_names_of_a_release_that_is_called_like_the_chart_do_not_repeat_it() -> None:
    names = of_kind(rendered(release="arbitrage"), "Deployment")
    assert set(names) == {f"arbitrage-{name}" for name in COMPONENTS}


def test_a_release_with_a_long_name_keeps_its_names_short_enough() -> None:
    for one in rendered(release="a" * 53):
        assert len(one["metadata"]["name"]) <= 63


def test_the_chart_has_the_version_of_the_project() -> None:
    told = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{told["appVersion"]}"\n' in project
