"""The compose file: Docker Compose takes it, the programs take what it gives them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from functools import cache
from typing import Any

import pytest
import yaml

from services.cli.arguments import command_line
from services.gateway.settings import GatewaySettings
from services.generator.settings import GeneratorSettings
from services.orchestrator.settings import OrchestratorSettings
from services.prm.settings import PrmSettings
from services.router.settings import RouterSettings
from services.rpc.settings import ServerSettings, read_settings
from tests.charts.tools import COMPOSE, ROOT, promtool
from tests.images.dockerfile import commands_of

pytestmark = pytest.mark.deploy

SETTINGS: dict[str, type[ServerSettings]] = {
    "orchestrator": OrchestratorSettings,
    "draft": GeneratorSettings,
    "target-1": GeneratorSettings,
    "target-2": GeneratorSettings,
    "prm": PrmSettings,
    "router": RouterSettings,
    "gateway": GatewaySettings,
}
OURS = sorted(SETTINGS)


@cache
def composed(*files: str, **environ: str) -> dict[str, Any]:
    """Returns the services as Docker Compose understands them."""
    assert COMPOSE.exists(), "Docker Compose is missing: run `make test-deploy`, which fetches it"
    named = [part for file in files or ("docker-compose.yml",) for part in ("--file", file)]
    run = subprocess.run(
        [str(COMPOSE), *named, "config", "--format", "json"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)["services"]
    return found


@pytest.mark.parametrize("name", OURS)
def test_a_program_takes_the_settings_that_it_is_given(name: str) -> None:
    given = composed()[name]["environment"]
    assert read_settings(SETTINGS[name], {**given, "ARBITRAGE_HOST": "0.0.0.0"})


@pytest.mark.parametrize("name", OURS)
def test_an_image_is_a_target_and_runs_its_own_command(name: str) -> None:
    service = composed()[name]
    target = service["build"]["target"]
    assert service["image"].split("/")[-1].split(":")[0] == target
    assert service["command"] is None
    assert service["entrypoint"] is None
    module = SETTINGS[name].__module__.removesuffix(".settings")
    assert commands_of()[target] == ["python", "-m", module]


def test_addresses_are_services_and_their_ports() -> None:
    services = composed()
    given = services["orchestrator"]["environment"]
    for role in ("draft", "target", "prm", "router"):
        for address in given[f"ARBITRAGE_{role.upper()}_ADDRESS"].split(","):
            host, _, port = address.partition(":")
            there = read_settings(SETTINGS[host], services[host]["environment"])
            assert there.model_dump()["port"] == int(port)
    assert given["ARBITRAGE_STORE_URL"] == "redis://redis:6379"
    asked = services["gateway"]["environment"]["ARBITRAGE_ORCHESTRATOR_ADDRESS"]
    assert asked == f"orchestrator:{OrchestratorSettings.model_fields['port'].default}"


def test_nothing_has_rights_or_writes_where_it_need_not() -> None:
    for name, service in composed().items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged", False), name
        # Whoever is not on this machine reaches nothing.
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ())), name


def test_each_waits_until_those_before_it_are_healthy() -> None:
    services = composed()
    for service in services.values():
        for name, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert services[name]["healthcheck"]["test"][0] == "CMD"
    before = {"redis", *OURS} - {"orchestrator", "gateway"}
    assert services["orchestrator"]["depends_on"].keys() == before
    assert services["gateway"]["depends_on"].keys() == {"orchestrator"}


@pytest.mark.parametrize("file", ["docker-compose.yml", "docs/images.md"])
def test_the_command_that_is_named_asks_the_orchestrator_and_starts_nothing(file: str) -> None:
    named = re.findall(r"exec orchestrator arbitrage (ask [^`\n]*)", (ROOT / file).read_text())
    [asked] = [command_line().parse_args(shlex.split(command)) for command in named]
    assert asked.address == f"localhost:{OrchestratorSettings.model_fields['port'].default}"


def test_redis_is_the_one_that_the_chart_has() -> None:
    values = yaml.safe_load((ROOT / "charts/arbitrage/values.yaml").read_text())
    assert composed()["redis"]["image"] == values["redis"]["bundled"]["image"]


def test_gpus_are_for_models_and_for_torch_with_cuda() -> None:
    files = ("docker-compose.yml", "docker-compose.gpu.yml")
    services = composed(*files, TORCH="cuda", DEVICE="cuda:0", TARGET_GPU="1")
    for name in OURS:
        has_gpu = "deploy" in services[name]
        assert has_gpu == (name not in ("orchestrator", "gateway"))
        if has_gpu:
            [device] = services[name]["deploy"]["resources"]["reservations"]["devices"]
            assert device["device_ids"] == ["1" if name.startswith("target") else "0"]
            assert services[name]["build"]["args"]["TORCH"] == "cuda"
            assert services[name]["environment"]["ARBITRAGE_DEVICE"] == "cuda:0"


def test_what_the_example_of_an_env_file_names_is_read_and_is_the_default() -> None:
    text = (ROOT / ".env.example").read_text()
    named = dict(re.findall(r"^# ([A-Z_]+)=(.*)$", text, re.MULTILINE))
    files = [(ROOT / name).read_text() for name in ("docker-compose.yml", "docker-compose.gpu.yml")]
    read = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", "".join(files)))
    # What an example is about is another value than the default.
    about = {"COMPOSE_FILE", "TORCH", "DEVICE"}
    assert named.keys() - {"COMPOSE_FILE"} == read.keys()
    assert {k: v for k, v in named.items() if k not in about} == {
        k: v for k, v in read.items() if k not in about
    }


def test_prometheus_scrapes_each_service_under_the_labels_that_the_dashboard_goes_by() -> None:
    path = ROOT / "deploy" / "compose" / "prometheus.yaml"
    checked = subprocess.run(
        [str(promtool()), "check", "config", str(path)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    [job] = yaml.safe_load(path.read_text())["scrape_configs"]
    [group] = job["static_configs"]
    assert sorted(group["targets"]) == [f"{name}:9464" for name in OURS]
    dashboard = (ROOT / "charts/arbitrage/dashboards/arbitrage.json").read_text()
    wanted = set(re.findall(r"(\w+)=\\\"\$\w+\\\"", dashboard))
    assert wanted == group["labels"].keys()


def test_every_file_that_is_mounted_is_there() -> None:
    for service in composed().values():
        for volume in service.get("volumes", ()):
            if volume["type"] == "bind":
                assert os.path.exists(volume["source"])
