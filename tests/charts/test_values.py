"""values.yaml is documented line by line, and values.schema.json is closed at every level."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.rendering import CHART, COMPONENTS, helm, refusal

pytestmark = pytest.mark.deploy

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
# Parts of Kubernetes' objects, which the API server closes.
OPEN = {"#/definitions/kubernetesObject", "#/definitions/named"}


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema that a reference stands for."""
    # The others of an allOf say only what must be there.
    schema = schema.get("allOf", [schema])[0]
    reference = schema.get("$ref")
    if reference is None:
        return schema
    found: dict[str, Any] = SCHEMA["definitions"][reference.removeprefix("#/definitions/")]
    return found


def open_places(schema: dict[str, Any], place: str) -> Iterator[str]:
    """Yields every place where a value would be taken that nobody knows."""
    if schema.get("$ref") in OPEN:
        return
    schema = resolved(schema)
    for part in schema.get("anyOf", ()):
        yield from open_places(part, place)
    kinds = schema.get("type")
    if not ({"type", "enum", "anyOf", "const"} & schema.keys()):
        yield f"{place}: takes anything"
    if kinds == "array":
        yield from open_places(schema.get("items", {}), f"{place}[]")
    if kinds == "object":
        if schema.get("additionalProperties") is not False:
            yield f"{place}: takes any key"
        for kind in ("properties", "patternProperties"):
            for name, inside in schema.get(kind, {}).items():
                yield from open_places(inside, f"{place}.{name}")


def leaves(values: Any, schema: dict[str, Any], place: str = "") -> Iterator[tuple[str, bool]]:
    """Yields every key of values.yaml, and whether the schema has it by its name."""
    schema = resolved(schema)
    for name, value in values.items():
        inside = schema.get("properties", {}).get(name)
        is_known = inside is not None or any(
            re.search(pattern, name) for pattern in schema.get("patternProperties", ())
        )
        yield f"{place}.{name}", is_known
        if isinstance(value, dict) and inside is not None:
            yield from leaves(value, inside, f"{place}.{name}")


def test_the_schema_is_closed_at_every_level() -> None:
    assert list(open_places(SCHEMA, "")) == []


def test_a_schema_that_is_open_is_found() -> None:
    opened = {"type": "object", "properties": {"a": {"type": "object"}}}
    assert list(open_places(opened, "")) == [": takes any key", ".a: takes any key"]


def test_every_value_is_in_the_schema() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    found = list(leaves(values, SCHEMA))
    assert len(found) > 250
    assert [place for place, is_known in found if not is_known] == []


def test_every_key_of_the_schema_has_a_default() -> None:
    def missing(schema: dict[str, Any], values: Any, place: str) -> Iterator[str]:
        for name, inside in resolved(schema).get("properties", {}).items():
            if name not in values:
                yield f"{place}.{name}"
            elif values[name] != {} and isinstance(values[name], dict):
                yield from missing(inside, values[name], f"{place}.{name}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    shown = [
        place
        for place in missing(SCHEMA, values, "")
        if place.split(".")[1] not in COMPONENTS and not place.endswith(".limits.cpu")
    ]
    assert shown == []


def needed(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the path of every value that is a block, or stands at the top."""
    for name, value in values.items():
        here = (*path, name)
        # A component's block may lack what `defaults` has; these two are the API server's to read.
        if path[:1] not in [(one,) for one in COMPONENTS] and name not in ("resources", "behavior"):
            if not path or (isinstance(value, dict) and value):
                yield here
            if isinstance(value, dict):
                yield from needed(value, here)


def test_nothing_that_the_templates_need_can_be_taken_away() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    paths = list(needed(values))
    assert len(paths) > 60
    for path in paths:
        taken: Any = None
        for name in reversed(path):
            taken = {name: taken}
        assert f"missing property '{path[-1]}'" in refusal(taken), path


def test_every_block_of_the_schema_needs_all_of_its_keys() -> None:
    def lacking(schema: dict[str, Any], place: str) -> Iterator[str]:
        # What `definitions` has may be said in part: `defaults` has the rest.
        for name, inside in schema.get("properties", {}).items():
            if name not in schema.get("required", ()):
                yield f"{place}.{name}"
            yield from lacking(inside, f"{place}.{name}")

    assert list(lacking(SCHEMA, "")) == []


def test_every_value_has_a_line_that_says_what_it_is() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    keys = [index for index, line in enumerate(lines) if re.match(r"^ *[\w.-]+:", line)]
    assert len(keys) > 250
    bare = [
        lines[index]
        for index in keys
        if not lines[index - 1].strip().startswith("#") and not _is_within_a_list(lines, index)
    ]
    assert bare == []


def _is_within_a_list(lines: list[str], index: int) -> bool:
    indent = len(lines[index]) - len(lines[index].lstrip())
    for line in reversed(lines[:index]):
        before = len(line) - len(line.lstrip())
        if before < indent:
            return line.lstrip().startswith("- ") or _is_within_a_list(lines, lines.index(line))
    return False


def test_all_components_have_one_shape() -> None:
    shape = {"$ref": "#/definitions/component"}
    for name in (*COMPONENTS, "defaults"):
        assert SCHEMA["properties"][name]["allOf"][0] == shape


def test_the_packaged_chart_holds_its_schema_and_dashboards(tmp_path: Path) -> None:
    helm("package", CHART, "--destination", tmp_path)
    [package] = tmp_path.glob("arbitrage-*.tgz")
    with tarfile.open(package) as archive:
        names = set(archive.getnames())
        inside = archive.extractfile("arbitrage/values.schema.json")
        assert inside is not None
        assert json.load(inside) == SCHEMA
    assert "arbitrage/dashboards/arbitrage.json" in names
    with pytest.raises(Exception, match="additional properties 'oops' not allowed"):
        helm("template", package, "--set", "oops=1")
