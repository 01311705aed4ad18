"""Every image serves as its user on a root that is read only."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cli.problems import bundled_problems
from services.engines.packs import find_pack
from tests.charts.tools import ROOT
from tests.images.dockerfile import IMAGES
from tests.images.running import Image, opened, remove_containers
from tests.images.test_compose import composed
from tests.services.redis_servers import free_port, redis_server
from tools.lock import LOCKS

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]

RPC_SERVICES = {
    "orchestrator": "OrchestratorService",
    "draft": "GeneratorService",
    "target-1": "GeneratorService",
    "prm": "PrmService",
    "router": "RouterService",
}
SERVICES = (*RPC_SERVICES, "gateway")
LOCK_OF = {"prm": "judge", "router": "judge"}
WITHOUT_TORCH = ("orchestrator", "gateway")


@pytest.fixture(scope="module", autouse=True)
def removed() -> Iterator[None]:
    """Takes the containers away whose files the tests look at."""
    yield
    remove_containers()


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """Runs an image for each service of the compose file, in its environment; gives their ports."""
    folder = tmp_path_factory.mktemp("images")
    found = {name: free_port() for name in SERVICES}
    services = composed()
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server(folder))
        for name, port in found.items():
            environ = {**services[name]["environment"], "ARBITRAGE_PORT": str(port)}
            environ |= {"ARBITRAGE_HOST": "127.0.0.1", "ARBITRAGE_METRICS_PORT": "0"}
            if name == "orchestrator":
                for role in ("draft", "target", "prm", "router"):
                    at = found["target-1" if role == "target" else role]
                    environ[f"ARBITRAGE_{role.upper()}_ADDRESS"] = f"127.0.0.1:{at}"
                environ["ARBITRAGE_STORE_URL"] = redis.url
            if name == "gateway":
                environ["ARBITRAGE_ORCHESTRATOR_ADDRESS"] = f"127.0.0.1:{found['orchestrator']}"
            image = opened(services[name]["build"]["target"])
            stack.enter_context(image.started(folder / f"{name}.log", environ))
        yield found


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest) -> Image:
    """Gives each image."""
    return opened(request.param)


def packages(image: Image) -> dict[str, str]:
    """Returns what its bill of materials names, by canonical name."""
    bill: Any = json.loads((image.root / "opt/arbitrage/sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    return {re.sub(r"[-_.]+", "-", c["name"]).lower(): c["version"] for c in bill["components"]}


def locked(image: Image) -> dict[str, str]:
    """Returns what its lock names."""
    lock = (LOCKS / f"{LOCK_OF.get(image.name, image.name)}.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE))


def test_it_says_what_it_is_and_who_it_runs_as(image: Image, capsys: Any) -> None:
    with capsys.disabled():
        print(f"\n{image.name}: {image.mib:.0f} MiB", end=" ")  # noqa: T201
    assert image.config["User"] == "10001:10001"
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    version = labels["org.opencontainers.image.version"]
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert image.run("id", "--user").stdout == "10001\n"


def test_its_bill_of_materials_is_its_lock_and_the_project(image: Image) -> None:
    has_torch = {} if image.name in WITHOUT_TORCH else {"torch": "2.13.0+cpu"}
    assert packages(image) == {**locked(image), "arbitrage": "0.1.0", **has_torch}


def test_nothing_can_be_written_but_below_tmp(image: Image) -> None:
    # /models is its own: what keeps it from writing there is the root alone.
    for folder in ("/", "/opt/arbitrage", "/models"):
        tried = image.run("python", "-c", f"open('{folder}/new', 'w')")
        assert "Read-only file system" in tried.stderr, tried.stderr
    assert image.run("python", "-c", "open('/tmp/new', 'w')").returncode == 0


def test_it_has_no_installer_and_no_compiler(image: Image) -> None:
    assert "No module named pip" in image.run("python", "-m", "pip").stderr
    for program in ("gcc", "buildah"):
        assert image.run("which", program).returncode != 0


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_runs_no_model_has_no_torch(name: str) -> None:
    tried = opened(name).run("python", "-c", "import torch")
    assert "No module named 'torch'" in tried.stderr


@pytest.mark.parametrize("name", RPC_SERVICES)
def test_it_answers_its_health_check(ports: dict[str, int], name: str) -> None:
    service = f"arbitrage.v1.{RPC_SERVICES[name]}"
    deadline_s = time.monotonic() + 180
    with grpc.insecure_channel(f"127.0.0.1:{ports[name]}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        while True:
            answer = health.Check(request, wait_for_ready=True, timeout=180)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            assert time.monotonic() < deadline_s, answer
            time.sleep(0.5)


def test_a_solution_comes_out_of_the_images_by_the_command_in_one(ports: dict[str, int]) -> None:
    address = f"--address=127.0.0.1:{ports['orchestrator']}"
    problem = bundled_problems(find_pack("tiny"), 1)[0].text
    # The orchestrator serves before it has seen the router.
    for _ in range(30):
        asked = opened("orchestrator").run("arbitrage", "ask", problem, address)
        assert asked.returncode == 0, asked.stderr
        if "router_unavailable" not in asked.stdout:
            break
        time.sleep(1.0)
    assert "router_unavailable" not in asked.stdout
    assert "ended by end_of_sequence" in asked.stdout
    by_target = opened("orchestrator").run(
        "arbitrage", "ask", problem, address, "--policy=target_only"
    )
    assert by_target.returncode == 0, by_target.stderr
    assert " target " in by_target.stdout


def test_the_gateway_answers_over_http(ports: dict[str, int]) -> None:
    problem = bundled_problems(find_pack("tiny"), 1)[0]
    asked = {"model": "target_only", "messages": [{"role": "user", "content": problem.text}]}
    url = f"http://127.0.0.1:{ports['gateway']}"
    transport = httpx2.HTTPTransport(retries=5)
    with httpx2.Client(base_url=url, transport=transport, timeout=180) as client:
        assert client.get("/health").json() == {"serving": True}
        answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    assert choice["finish_reason"] == "stop", choice


def test_the_command_of_packs_runs_in_the_images_of_models() -> None:
    for name in ("generator", "prm", "router"):
        listed = opened(name).run("arbitrage", "models", "list")
        assert listed.returncode == 0, listed.stderr
        assert "tiny" in listed.stdout


def test_training_tells_how_it_is_used() -> None:
    told = opened("training").run(*opened("training").command)
    assert told.returncode == 0, told.stderr
    assert "collect" in told.stdout
