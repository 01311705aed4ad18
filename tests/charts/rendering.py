"""What the chart makes of values, by a real Helm."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests.charts.tools import HELM, ROOT

CHART: Final = ROOT / "charts" / "arbitrage"
EXAMPLES: Final = tuple(sorted((CHART / "examples").glob("*.yaml")))
RELEASE: Final = "try"
NAMESPACE: Final = "reasoning"
MODELS: Final = ("draft", "target", "prm", "router")
COMPONENTS: Final = ("orchestrator", *MODELS, "gateway")
_SOURCE: Final = "# Source: arbitrage/templates/"

Values = Mapping[str, Any]
Object = dict[str, Any]


class Refused(Exception):
    """Helm did not take the values; the message is its own."""


class _Strict(yaml.SafeLoader):  # type: ignore[misc]  # the library has no types
    """Reads YAML, and takes no key twice: what is said last would win, and nobody would know."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"said twice{node.start_mark}: {twice}"
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def helm(*arguments: str | Path, given: str | None = None) -> str:
    """Runs Helm and returns what it writes.

    Raises:
        Refused
    """
    assert HELM.exists(), "Helm is missing: run `make test-deploy`, which fetches it"
    command = [str(HELM), *map(str, arguments)]
    run = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise Refused(run.stderr)
    return run.stdout


def rendered(values: Values | None = None, *files: Path, release: str = RELEASE) -> list[Object]:
    """Returns the objects that the values make, over those of the files."""
    text = _template(json.dumps(values or {}), files, release)
    return [found for found in yaml.load_all(text, _Strict) if found is not None]


def sources(values: Values | None = None, *files: Path) -> dict[str, list[Object]]:
    """Returns the objects by the template that made them."""
    text = _template(json.dumps(values or {}), files, RELEASE)
    found: dict[str, list[Object]] = {}
    for part in text.split("\n---"):
        if _SOURCE in part:
            name = part.split(_SOURCE, 1)[1].splitlines()[0]
            loaded = yaml.load(part, _Strict)
            if loaded is not None:
                found.setdefault(name, []).append(loaded)
    return found


def refusal(values: Values) -> str:
    """Returns what Helm says of values that it must not take."""
    try:
        rendered(values)
    except Refused as error:
        return str(error)
    raise AssertionError(f"values were taken: {values}")


def notes(values: Values | None = None) -> str:
    """Returns what an installation tells."""
    said = helm(
        *("install", RELEASE, CHART, "--namespace", NAMESPACE, "--values", "-"),
        *("--dry-run=client", "--output", "json"),
        given=json.dumps(values or {}),
    )
    told: str = json.loads(said)["info"]["notes"]
    return told


@cache
def _template(values: str, files: tuple[Path, ...], release: str) -> str:
    arguments = [part for file in files for part in ("--values", file)]
    return helm(
        *("template", release, CHART, "--namespace", NAMESPACE, *arguments, "--values", "-"),
        given=values,
    )


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    """Returns those of a kind, by name."""
    return {found["metadata"]["name"]: found for found in objects if found["kind"] == kind}


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Yields every pod that the objects make: whose it is, and metadata and spec."""
    for found in objects:
        name = f"{found['kind']}/{found['metadata']['name']}"
        spec = found.get("spec", {})
        match found["kind"]:
            case "Pod":
                yield name, found
            case "Deployment" | "StatefulSet" | "Job":
                yield name, spec["template"]
            case "CronJob":
                yield name, spec["jobTemplate"]["spec"]["template"]
            case "InferenceService":
                predictor = dict(spec["predictor"])
                labels = predictor.pop("labels")
                if "model" in predictor:
                    predictor["containers"] = [{"name": "kserve-container", **predictor["model"]}]
                yield name, {"metadata": {"labels": labels}, "spec": predictor}


def containers(pod: Object) -> Iterator[Object]:
    """Yields every container of a pod."""
    yield from pod["spec"].get("initContainers", ())
    yield from pod["spec"]["containers"]


def environment(pod: Object, container: str) -> dict[str, Any]:
    """Returns the environment of a container: values, or where they come from."""
    [found] = [one for one in containers(pod) if one["name"] == container]
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in found["env"]}


def pod_of(objects: list[Object], component: str) -> Object:
    """Returns the pod of a component's Deployment."""
    return dict(pods(objects))[f"Deployment/{RELEASE}-arbitrage-{component}"]
