"""Revisions at a place: added whole, pointed to in one act, read only when undamaged."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from services.engines.revisions import (
    LocationUnreachable,
    RevisionError,
    RevisionStore,
    is_location,
)


@pytest.fixture(params=["folder", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return str(tmp_path / "place")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a checkpoint folder whose files a text decides."""

    def make(text: str) -> Path:
        folder = tmp_path / f"made-{text}"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(text.encode() * 100)
        (folder / "router.json").write_text(json.dumps({"text": text}))
        return folder

    return make


def test_what_was_promoted_is_fetched_again(
    location: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    store = RevisionStore(location)
    assert store.current() is None
    revision = store.add(checkpoint("a"))
    assert store.current() is None
    store.point_to(revision, {"why": "first"})
    assert RevisionStore(location).current() == revision
    assert RevisionStore(location).history()[-1].note == {"why": "first"}
    folder = store.fetch(revision, tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == b"a" * 100
    assert store.fetch(revision, tmp_path / "cache") == folder


def test_equal_files_are_one_revision(location: str, checkpoint: Callable[[str], Path]) -> None:
    store = RevisionStore(location)
    assert store.add(checkpoint("a")) == store.add(checkpoint("a"))
    assert store.add(checkpoint("b")) != store.add(checkpoint("a"))


def test_a_rollback_goes_to_the_revision_before_and_no_further(
    location: str, checkpoint: Callable[[str], Path]
) -> None:
    store = RevisionStore(location)
    first, second = store.add(checkpoint("a")), store.add(checkpoint("b"))
    store.point_to(first, {})
    store.point_to(second, {})
    assert store.rollback() == first
    assert store.current() == first
    with pytest.raises(RevisionError, match="no revision before"):
        store.rollback()
    assert store.current() == first


def test_a_crash_before_the_pointer_is_replaced_leaves_the_old_revision(
    location: str, checkpoint: Callable[[str], Path]
) -> None:
    store = RevisionStore(location)
    first = store.add(checkpoint("a"))
    store.point_to(first, {})
    second = store.add(checkpoint("b"))
    assert RevisionStore(location).current() == first
    store.point_to(second, {})
    assert RevisionStore(location).current() == second


def test_a_half_copied_revision_cannot_be_pointed_to_and_is_completed_by_adding_it_again(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    place = tmp_path / "place"
    store = RevisionStore(str(place))
    revision = store.add(checkpoint("a"))
    # What a kill between the last file and the digests leaves.
    (place / "revisions" / f"{revision}.json").unlink()
    (place / "revisions" / revision / "router.json").unlink()
    with pytest.raises(RevisionError, match="not there in full"):
        store.point_to(revision, {})
    assert store.add(checkpoint("a")) == revision
    store.point_to(revision, {})
    assert store.fetch(revision, tmp_path).name == revision


def test_a_changed_file_is_refused_by_name(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    store = RevisionStore(str(tmp_path / "place"))
    revision = store.add(checkpoint("a"))
    (tmp_path / "place" / "revisions" / revision / "model.safetensors").write_bytes(b"other")
    with pytest.raises(RevisionError, match="model.safetensors is damaged"):  # noqa: RUF043
        store.fetch(revision, tmp_path)


def test_a_copy_that_was_damaged_is_fetched_again(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    store = RevisionStore(f"memory://{tmp_path.name}")
    revision = store.add(checkpoint("a"))
    copy = store.fetch(revision, tmp_path / "cache") / "model.safetensors"
    copy.write_bytes(b"other")
    store.fetch(revision, tmp_path / "cache")
    assert copy.read_bytes() == b"a" * 100
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [revision]


def test_a_copy_that_a_killed_pod_left_is_removed_and_a_live_one_is_not(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    store = RevisionStore(f"memory://{tmp_path.name}")
    revision = store.add(checkpoint("a"))
    left, live = (tmp_path / f"{revision}.pod-{name}.7.partial" for name in "ab")
    for folder in (left, live):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"a")
        os.utime(folder / "model.safetensors", (0, 0))
        os.utime(folder, (0, 0))
    (live / "router.json").write_text("{")
    os.utime(live, (0, 0))
    store.fetch(revision, tmp_path)
    assert not left.exists()
    assert live.exists()


def test_a_cache_that_cannot_be_written_to_is_not_called_damage(
    tmp_path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RevisionStore(f"memory://{tmp_path.name}")
    revision = store.add(checkpoint("a"))

    def refuse(_: Path, target: Path) -> None:
        raise PermissionError(f"{target} is not yours")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(RevisionError, match=r"cannot be written: .* is not yours"):
        store.fetch(revision, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_what_was_damaged_is_mended_by_adding_it_again(
    location: str, tmp_path: Path, checkpoint: Callable[[str], Path], damage: str
) -> None:
    store = RevisionStore(location)
    revision = store.add(checkpoint("a"))
    files, root = fsspec.core.url_to_fs(location)
    path = f"{root}/revisions/{revision}/model.safetensors"
    if damage == "changed":
        files.pipe_file(path, b"other")
    else:
        files.rm_file(path)
    assert store.add(checkpoint("a")) == revision
    assert store.fetch(revision, tmp_path / "fetched").is_dir()


@pytest.mark.parametrize("name", ["../../etc", "", "ABCDEF0123456789", "0" * 17])
def test_a_name_that_is_no_revision_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(RevisionError, match="is no revision"):
        RevisionStore(str(tmp_path)).fetch(name, tmp_path)


def test_a_manifest_cannot_name_a_path(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    store = RevisionStore(str(tmp_path / "place"))
    revision = store.add(checkpoint("a"))
    manifest = tmp_path / "place" / "revisions" / f"{revision}.json"
    manifest.write_text(json.dumps({"sha256": {"../x": "0"}}))
    with pytest.raises(RevisionError, match="which is a path"):
        store.fetch(revision, tmp_path)


@pytest.mark.parametrize(
    ("pointer", "said"),
    [
        ('{"format_version": 2, "history": []}', "unknown version 2"),
        ('{"format_version": 1, "history": [{}]}', "history: expected a list of promotions"),
        ("[1]", "expected an object"),
        ("{", "is no JSON"),
    ],
)
def test_a_pointer_that_is_not_understood_is_refused(
    tmp_path: Path, pointer: str, said: str
) -> None:
    (tmp_path / "current.json").write_text(pointer)
    with pytest.raises(RevisionError, match=said):
        RevisionStore(str(tmp_path)).current()


def test_a_place_that_cannot_be_read_now_may_be_readable_later(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocationUnreachable, match="cannot be read or written"):
        RevisionStore(str(tmp_path / "file")).current()


def test_a_kind_of_url_that_nobody_knows_is_refused() -> None:
    with pytest.raises(RevisionError, match="give a folder or a URL"):
        RevisionStore("nosuch://bucket")


def test_a_checkpoint_folder_is_no_place_of_revisions(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    assert not is_location(str(checkpoint("a")))
    store = RevisionStore(str(tmp_path / "place"))
    store.point_to(store.add(checkpoint("a")), {})
    assert is_location(str(tmp_path / "place"))
    assert is_location("s3://bucket/routers")


def test_a_pointer_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "current.json").write_text('{"format_version": 1, "history": ' + "[" * 100_000)
    with pytest.raises(RevisionError, match="it is no JSON"):
        RevisionStore(str(tmp_path)).current()


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "two\nlines", "\ud800"])
def test_a_file_that_no_folder_can_hold_is_missing(
    tmp_path: Path, checkpoint: Callable[[str], Path], name: str
) -> None:
    store = RevisionStore(str(tmp_path / "place"))
    revision = store.add(checkpoint("a"))
    manifest = tmp_path / "place" / "revisions" / f"{revision}.json"
    manifest.write_text(json.dumps({"sha256": {name: "0" * 64}}))
    with pytest.raises(RevisionError, match="is damaged or missing") as raised:
        store.fetch(revision, tmp_path)
    assert str(raised.value).isprintable()
