"""Starts the servers that `install` has installed, and cuts connections to them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.engines.install import GGUF, HOME, MODEL_FOLDER, python_of
from tests.services.redis_servers import free_port

MODEL_NAME = "smollm2"
CONTEXT_TOKENS = 2048
PRM_NAME = "prm"
PRM_CONTEXT_TOKENS = 256
_START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class EngineProcess:
    """A server that is running, where it listens, and what it writes."""

    kind: str
    url: str
    log: Path

    def work(self) -> float:
        """Returns a count to compare with: of connections left, or of tokens decoded for vLLM."""
        if self.kind == "llamacpp":
            return self.log.read_text(errors="replace").count("Disconnected from client")
        return self._metric("vllm:generation_tokens_total")

    def has_stopped(self, work_before: float, max_tokens: int) -> bool:
        """Whether it has given up, before its end, the one request that came since then."""
        done = self.work() - work_before
        if self.kind == "llamacpp":
            return done > 0
        return self._metric("vllm:num_requests_running") == 0.0 and 0.0 < done < max_tokens

    def _metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


@contextmanager
def vllm() -> Iterator[EngineProcess]:
    """Serves the model with vLLM until the block is left."""
    options = ["--model", str(MODEL_FOLDER), "--served-model-name", MODEL_NAME]
    options += ["--dtype", "float32", "--max-model-len", str(CONTEXT_TOKENS), "--enforce-eager"]
    with _serving("vllm", "vllm.entrypoints.openai.api_server", options) as process:
        yield process


@contextmanager
def vllm_prm(folder: Path, *options: str) -> Iterator[EngineProcess]:
    """Serves a process reward model with vLLM until the block is left."""
    told = ["--model", str(folder), "--served-model-name", PRM_NAME, "--dtype", "float32"]
    told += ["--max-model-len", str(PRM_CONTEXT_TOKENS), "--enforce-eager", *options]
    with _serving("vllm", "vllm.entrypoints.openai.api_server", told) as process:
        yield process


@contextmanager
def llamacpp() -> Iterator[EngineProcess]:
    """Serves the model with llama.cpp until the block is left.

    Without `interrupt_requests` off, each request ends the one before it.
    """
    options = ["--model", str(GGUF), "--model_alias", MODEL_NAME, "--n_ctx", str(CONTEXT_TOKENS)]
    options += ["--interrupt_requests", "False", "--logits_all", "true"]
    with _serving("llamacpp", "llama_cpp.server", options) as process:
        yield process


@contextmanager
def _serving(name: str, module: str, options: Sequence[str]) -> Iterator[EngineProcess]:
    python = python_of(name)
    if not python.exists():
        raise FileNotFoundError(f"{python} is missing; run `make test-engines`, which installs it")
    port = free_port()
    running = EngineProcess(name, f"http://127.0.0.1:{port}", HOME / f"{name}.log")
    listen = ("--host", "127.0.0.1", "--port", str(port))
    environ = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with running.log.open("wb") as log:
        process = subprocess.Popen(
            [python, "-m", module, *options, *listen],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
        )
    try:
        _wait_until_it_answers(running, process)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_it_answers(running: EngineProcess, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{running.url}/v1/models").close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"{running.kind} does not serve; its log is {running.log}")


@dataclass
class CuttingProxy:
    """Passes connections on to a server; once `cut_after_bytes` more have come back, cuts one."""

    url: str
    cut_after_bytes: int | None = None

    @property
    def is_armed(self) -> bool:
        """Whether a cut is still to come."""
        return self.cut_after_bytes is not None

    async def copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes on what the server sends, up to the cut."""
        while part := await reader.read(256):
            if self.cut_after_bytes is not None:
                self.cut_after_bytes -= len(part)
                if self.cut_after_bytes < 0:
                    self.cut_after_bytes = None
                    return
            writer.write(part)
            await writer.drain()


@asynccontextmanager
async def cutting_proxy(url: str) -> AsyncIterator[CuttingProxy]:
    """Stands before the server at `url` until the block is left."""
    parts = urlsplit(url)
    proxy = CuttingProxy("")
    tasks: set[asyncio.Task[None]] = set()

    async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        there, back = await asyncio.open_connection(parts.hostname, parts.port)
        to_server = asyncio.ensure_future(_copy(reader, back))
        to_client = asyncio.ensure_future(proxy.copy(there, writer))
        try:
            await asyncio.wait({to_server, to_client}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # The proxy is being closed; asyncio's own callback would complain of it.
            pass
        finally:
            to_server.cancel()
            to_client.cancel()
            await asyncio.gather(to_server, to_client, return_exceptions=True)
            writer.close()
            back.close()
            tasks.discard(task)

    server = await asyncio.start_server(passed_on, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while part := await reader.read(4096):
        writer.write(part)
        await writer.drain()
