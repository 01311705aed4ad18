"""The Dockerfile and the locks, without building anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.charts.cases import CASES
from tests.charts.rendering import pods, rendered
from tests.charts.tools import ROOT
from tests.images.dockerfile import IMAGES, PATH, commands_of
from tools.audit import pins_of
from tools.lock import CUDA, EXTRAS, LOCKS, TOOLS

pytestmark = pytest.mark.deploy

VALUES = yaml.safe_load((ROOT / "charts/arbitrage/values.yaml").read_text())
ALL = (*EXTRAS, *TOOLS, CUDA)


def packages(name: str) -> dict[str, tuple[str, int]]:
    """Returns version and number of hashes of each package of a lock."""
    entries = re.split(r"^(?=\w)", (LOCKS / f"{name}.txt").read_text(), flags=re.MULTILINE)
    found = {}
    for entry in entries:
        if pinned := re.match(r"([\w.-]+)==(\S+)", entry):
            found[pinned[1]] = pinned[2], entry.count("--hash=sha256:")
    return found


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    run = subprocess.run([str(hadolint), str(PATH)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")


def test_each_image_of_the_chart_is_a_target_with_the_charts_command() -> None:
    assert commands_of().keys() == set(IMAGES)
    seen = set()
    registry = VALUES["image"]["registry"]
    values, *files = CASES["paper-vllm"]
    for whose, pod in pods(rendered(values, *files)):
        for container in pod["spec"]["containers"]:
            name = container["image"].split("/")[-1].split(":")[0]
            if container["image"].startswith(registry):
                assert name in IMAGES, whose
                seen.add(name)
                if whose.startswith("Deployment/"):
                    assert commands_of()[name] == container["command"]
    assert seen == set(IMAGES)


def test_the_user_is_a_number_and_the_charts() -> None:
    security = VALUES["defaults"]["security"]
    users = re.findall(r"^USER (\S+)$", PATH.read_text(), re.MULTILINE)
    assert users == [f"{security['runAsUser']}:{security['runAsGroup']}"]


@pytest.mark.parametrize("name", ALL)
def test_a_lock_has_the_tested_versions_and_a_hash_of_each_file(name: str) -> None:
    pins = pins_of((ROOT / "constraints.txt").read_text())
    found = packages(name)
    assert found
    for package, (version, hashes) in found.items():
        assert hashes > 0, package
        if package in pins:
            assert str(pins[package].specifier) == f"=={version}", package


@pytest.mark.parametrize("name", EXTRAS)
def test_no_lock_of_an_image_brings_torch_or_anything_of_cuda(name: str) -> None:
    assert not {p for p in packages(name) if p.startswith(("torch", "nvidia-", "triton"))}
    assert {"torch", "triton"} <= packages(CUDA).keys()


def test_orchestrator_and_gateway_have_no_library_of_models() -> None:
    for name in ("orchestrator", "gateway"):
        assert not packages(name).keys() & {"numpy", "transformers", "safetensors"}
    assert {"grpcio", "starlette", "uvicorn"} <= packages("gateway").keys()
    assert {"grpcio", "redis", "opentelemetry-sdk", "rich"} <= packages("orchestrator").keys()


def test_torch_of_the_image_is_the_tested_one() -> None:
    [version] = re.findall(r"torch==(\S+)", (LOCKS / "torch").read_text())
    assert packages(CUDA)["torch"][0] == version
    assert str(pins_of((ROOT / "constraints.txt").read_text())["torch"].specifier) == f"=={version}"
