"""A pack is found, read and verified, and a broken one is told apart by file and reason."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from services.engines.pack_manifest import CorruptPack, UnknownPack, load_pack
from services.engines.packs import find_pack, pack_folders, resolve_model, search_path, verify_pack

BUNDLED = Path(__file__).resolve().parents[2] / "model_packs"
WEIGHTS = b"not really weights"


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "format_version": 1,
        "name": "little",
        "licence": "Apache-2.0",
        "description": "for tests",
        "separator": "\n\n",
        "models": {"draft": {"path": "draft", "kind": "causal-lm"}},
        "files": [
            {
                "path": "draft/model.safetensors",
                "size_bytes": len(WEIGHTS),
                "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
            }
        ],
        **changes,
    }


def write_pack(folder: Path, content: object) -> Path:
    (folder / "draft").mkdir(parents=True)
    (folder / "draft" / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "pack.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def pack_folder(tmp_path: Path) -> Path:
    return write_pack(tmp_path / "little", manifest())


def test_a_good_pack_is_read_and_found_undamaged(pack_folder: Path) -> None:
    pack = load_pack(pack_folder)
    assert pack.name == "little"
    assert pack.model_reference("draft") == str(pack_folder / "draft")
    assert pack.size_bytes == len(WEIGHTS)
    assert verify_pack(pack) == ()


def test_verifying_tells_how_many_bytes_it_has_read(pack_folder: Path) -> None:
    counts: list[int] = []
    verify_pack(load_pack(pack_folder), counts.append)
    assert sum(counts) == len(WEIGHTS)


def test_one_changed_byte_is_found_with_both_digests(pack_folder: Path) -> None:
    changed = b"N" + WEIGHTS[1:]
    (pack_folder / "draft" / "model.safetensors").write_bytes(changed)
    (damage,) = verify_pack(load_pack(pack_folder))
    assert damage.path == "draft/model.safetensors"
    assert hashlib.sha256(WEIGHTS).hexdigest() in damage.problem
    assert hashlib.sha256(changed).hexdigest() in damage.problem


def test_a_file_of_another_size_is_found(pack_folder: Path) -> None:
    (pack_folder / "draft" / "model.safetensors").write_bytes(WEIGHTS[:-1])
    (damage,) = verify_pack(load_pack(pack_folder))
    assert "18 bytes, found 17" in damage.problem


def test_a_file_nobody_pinned_is_found_where_a_service_could_read_it(pack_folder: Path) -> None:
    (pack_folder / "draft" / "deeper").mkdir()
    for path in ("draft/adapter.safetensors", "draft/deeper/code.py", "problems.jsonl"):
        (pack_folder / path).write_text("added later")
    (pack_folder / "README.md").write_text("read by people")
    damages = verify_pack(load_pack(pack_folder))
    assert [damage.path for damage in damages] == [
        "draft/adapter.safetensors",
        "draft/deeper/code.py",
        "problems.jsonl",
    ]
    assert {damage.problem for damage in damages} == {"is not listed in pack.json; remove it"}


@pytest.mark.parametrize("linked", ["draft", "draft/model.safetensors"])
def test_a_link_that_leads_out_of_the_pack_is_found(pack_folder: Path, linked: str) -> None:
    outside = pack_folder.parent / "outside"
    (pack_folder / linked).rename(outside)
    (pack_folder / linked).symlink_to(outside)
    (damage,) = verify_pack(load_pack(pack_folder))
    assert damage.path == "draft/model.safetensors"
    assert f"leads out of the pack, to {outside}" in damage.problem


def test_a_link_to_a_folder_is_found_inside_a_model_folder(pack_folder: Path) -> None:
    (pack_folder / "draft" / "more").symlink_to(pack_folder.parent)
    (damage,) = verify_pack(load_pack(pack_folder))
    assert damage.path == "draft/more"


def test_a_pack_reached_over_a_link_is_undamaged(pack_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(pack_folder)
    assert verify_pack(load_pack(tmp_path / "linked")) == ()


def test_a_file_that_is_no_regular_one_is_not_read(pack_folder: Path) -> None:
    weights = pack_folder / "draft" / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    (damage,) = verify_pack(load_pack(pack_folder))
    assert damage.problem == "is no regular file"


def test_the_shipped_pack_is_pinned_whole() -> None:
    assert verify_pack(find_pack("tiny", [BUNDLED])) == ()


def test_a_missing_file_is_found(pack_folder: Path) -> None:
    (pack_folder / "draft" / "model.safetensors").unlink()
    (damage,) = verify_pack(load_pack(pack_folder))
    assert damage.problem == "is missing"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"format_version": True}, "format_version must be an integer"),
        ({"name": 7}, "name must be a string, got 7"),
        ({"models": []}, "models must be an object"),
        ({"models": {"draft": {"path": "../draft", "kind": "causal-lm"}}}, "inside the pack"),
        ({"models": {"draft": {"path": "/etc", "kind": "causal-lm"}}}, "inside the pack"),
        ({"models": {"draft": {"path": "draft"}}}, "kind must be a string"),
        ({"files": {}}, "files must be a list"),
        ({"files": ["a"]}, r"files\[0\] must be an object"),
        (
            {"files": [{"path": "../secret", "size_bytes": 1, "sha256": "0" * 64}]},
            "path must stay inside the pack, got '../secret'",
        ),
        ({"files": [{"path": "a", "size_bytes": 1, "sha256": "0"}]}, "sha256 must be 64"),
        ({"files": [{"path": "a", "size_bytes": -1, "sha256": "0" * 64}]}, "size_bytes must be"),
        (
            {"files": [{"path": "a", "size_bytes": 10**400, "sha256": "0" * 64}]},
            "size_bytes must be from 0",
        ),
        ({"models": {"draft": {"path": ".", "kind": "causal-lm"}}}, "inside the pack"),
        (
            {"models": {"target": {"path": "target", "kind": "causal-lm"}}},
            "files must list those of target, which are in target",
        ),
        (
            {"files": [{"path": "draft/\0", "size_bytes": 1, "sha256": "0" * 64}]},
            r"path must be text without NUL, got 'draft/\\x00'",
        ),
        ({"name": "\ud800"}, "name must be text"),
    ],
)
def test_a_wrong_manifest_is_refused_by_field(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = write_pack(tmp_path / "little", manifest(**changes))
    with pytest.raises(CorruptPack, match=said) as caught:
        load_pack(folder)
    assert str(folder / "pack.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"pack"', "\xff"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pack.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptPack):
        load_pack(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ('{"name": ' + "[" * 900 + "]" * 900 + "}", "format_version"),
        ('{"format_version": ' + "1" * 5_000 + "}", "cannot be read"),
        ('{"format_version": ' + "1" * 4_000 + "}", "format_version is 1111"),
        ('{"format_version": 1, "format_version": 2}', "'format_version' is there twice"),
        ('{"files": [{"path": "a", "path": "b"}]}', "'path' is there twice"),
    ],
    ids=["deep", "less deep", "5,000 digits", "4,000 digits", "twice", "twice inside"],
)
def test_a_manifest_made_to_confuse_is_refused_in_a_few_words(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "pack.json").write_text(text)
    with pytest.raises(CorruptPack, match=said) as caught:
        load_pack(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "pack.json"))
    assert len(str(caught.value)) < 1_000


def test_a_pack_is_found_by_name_or_by_path(pack_folder: Path) -> None:
    assert find_pack("little", [pack_folder.parent]).folder == pack_folder
    assert find_pack(str(pack_folder), []).folder == pack_folder


def test_an_unknown_pack_is_refused_with_the_closest_names_first(tmp_path: Path) -> None:
    for name in ("zebra", "little"):
        write_pack(tmp_path / name, manifest())
    with pytest.raises(UnknownPack, match=r"'litle'; known packs: little, zebra"):
        find_pack("litle", [tmp_path])
    with pytest.raises(UnknownPack, match="is no model pack"):
        find_pack(f"{tmp_path}/nowhere", [])


def test_a_search_that_finds_no_pack_at_all_tells_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(UnknownPack, match="no packs found in") as caught:
        find_pack("tiny", iter([tmp_path / "a", tmp_path / "b"]))
    assert f"{tmp_path / 'a'}, {tmp_path / 'b'}" in str(caught.value)
    assert "set ARBITRAGE_MODEL_PACKS" in str(caught.value)


def test_the_first_folder_on_the_path_wins(tmp_path: Path) -> None:
    mine = write_pack(tmp_path / "mine" / "little", manifest())
    write_pack(tmp_path / "theirs" / "little", manifest())
    folders = [tmp_path / "mine", tmp_path / "theirs"]
    assert list(pack_folders(folders)) == [mine]


def test_the_environment_comes_before_the_bundled_packs() -> None:
    named = search_path({"ARBITRAGE_MODEL_PACKS": f"/a{os.pathsep}/b"})
    assert named[:2] == (Path("/a"), Path("/b"))
    assert named[2].name == "model_packs"


def test_a_member_of_a_pack_is_a_model_reference(pack_folder: Path) -> None:
    folders = [pack_folder.parent]
    assert resolve_model("little/draft", folders) == str(pack_folder / "draft")
    assert resolve_model("someone/some-model", folders) is None
    assert resolve_model("little", folders) is None
    with pytest.raises(UnknownPack, match="has no 'target'; it has: draft"):
        resolve_model("little/target", folders)


@pytest.mark.parametrize(
    "name", ["./" + "n" * 300, "a\0b/c", "two\nlines/x", "\ud800/x", "n" * 9_999]
)
def test_a_name_that_no_file_can_have_is_an_unknown_pack(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnknownPack) as raised:
        find_pack(name, [tmp_path])
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600


def test_damage_is_told_on_one_short_line(pack_folder: Path) -> None:
    files = manifest()["files"]
    odd = [{**files[0], "path": path} for path in ("draft/a\nb", "draft/" + "n" * 9_999)]
    (pack_folder / "pack.json").write_text(json.dumps(manifest(files=[*files, *odd])))
    told = [str(damage) for damage in verify_pack(load_pack(pack_folder))]
    assert [line.isprintable() and len(line) < 300 for line in told] == [True, True]
