"""Checks objects by their API's schemas, closed: a field that nobody knows is an error."""

from __future__ import annotations

import gzip
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import jsonschema
from referencing import Registry, Resource

from tests.charts.rendering import Object

# The oldest that Chart.yaml allows, and the newest that is known.
VERSIONS: Final = ("1.30.0", "1.37.0")
_CUSTOM: Final = Path(__file__).parent / "schemas"


def problems(found: Object, version: str) -> list[str]:
    """Returns what is wrong with an object, each with its place."""
    name = f"{found['kind']}/{found['metadata']['name']}"
    errors = _validator(found["apiVersion"], found["kind"], version).iter_errors(found)
    return [f"{name} {error.json_path}: {error.message}" for error in errors]


@cache
def _validator(api: str, kind: str, version: str) -> Any:
    group, _, of_group = api.rpartition("/")
    custom = _CUSTOM / f"{group}_{of_group}_{kind.lower()}.json.gz"
    if custom.exists():
        return jsonschema.Draft202012Validator(json.loads(gzip.decompress(custom.read_bytes())))
    short = f"{group.split('.')[0]}-{of_group}" if group else of_group
    schema = _built_in(version, f"{kind.lower()}-{short}")
    return jsonschema.Draft202012Validator(schema, registry=_registry(version))


@cache
def _registry(version: str) -> Any:
    empty: Any = Registry()
    return Resource.from_contents(_built_in(version, "_definitions")) @ empty


def _built_in(version: str, name: str) -> Any:
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    return json.loads((folder / f"{name}.json").read_text())
