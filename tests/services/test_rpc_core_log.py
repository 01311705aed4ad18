"""What native code writes to standard error: passed on, and failed handshakes counted."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest

from arbitrage.client import AsyncArbitrageClient, DraftOnly
from services.generator.servicer import GeneratorServicer
from tests.services.certificates import Authority
from tests.services.fakes_engines import FakeGeneratorEngine
from tests.services.running import GENERATOR, serving
from tests.services.test_servicer_processes import ROOT, ended, ready, started


@dataclass(frozen=True)
class Running:
    """An orchestrator in a process of its own."""

    process: Process
    port: int
    metrics_port: int

    @property
    def address(self) -> str:
        """Its address by a name that its certificate has."""
        return f"localhost:{self.port}"

    async def refused_count(self, reason: str) -> float:
        """Returns how many callers it has turned away."""
        return await asyncio.to_thread(self._refused_count, reason)

    def _refused_count(self, reason: str) -> float:
        with urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=20) as page:
            for line in page.read().decode().splitlines():
                if line.startswith(f'arbitrage_refused_calls_total{{reason="{reason}"}}'):
                    return float(line.rpartition(" ")[2])
        raise AssertionError(f"no such series: {reason}")

    async def stopped(self) -> str:
        """Tells it to stop, and returns what it wrote."""
        self.process.terminate()
        code, written = await ended(self.process)
        assert code == 0, written
        return written


@asynccontextmanager
async def orchestrator(
    folder: Path, engine: FakeGeneratorEngine, **variables: str
) -> AsyncIterator[Running]:
    """Starts an orchestrator whose draft and target are an engine in this process."""
    async with (
        serving(GENERATOR, GeneratorServicer(engine, 256)) as server,
        started(
            "services.orchestrator",
            ARBITRAGE_DRAFT_ADDRESS=server.address,
            ARBITRAGE_TARGET_ADDRESS=server.address,
            ARBITRAGE_READY_FILE=str(folder / "ready.json"),
            **variables,
        ) as process,
    ):
        found = await ready(process, folder / "ready.json")
        port = int(found["address"].rpartition(":")[2])
        yield Running(process, port, found["metrics_port"])


def shake_hands(port: int, tls: ssl.SSLContext | None) -> None:
    """Connects once, over TLS or not, and waits until the server has closed.

    A channel of gRPC would not do: it connects again and again until it is collected, also after
    it was closed, and each time is one more failed handshake.
    """
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    with connection, suppress(ssl.SSLError, ConnectionError):
        if tls is None:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            said = connection.recv(1)
        else:
            # In TLS 1.3 the client is done before the server has looked at its certificate.
            with tls.wrap_socket(connection, server_hostname="localhost") as encrypted:
                said = encrypted.recv(1)
        assert said == b""


def caller(authority: Authority, own: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """Returns how a caller speaks TLS that believes `authority`, with a certificate or without."""
    context = ssl.create_default_context(cafile=authority.path)
    if own is not None:
        context.load_cert_chain(*own)
    return context


@pytest.mark.slow
async def test_each_kind_of_failed_handshake_is_counted_and_told_with_its_cause(
    tmp_path: Path,
) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    certificate, key = authority.issue("server", "localhost")
    cases = {
        "CERTIFICATE_VERIFY_FAILED: certificate has expired": caller(
            authority, authority.issue("expired", "caller.example", year=2020)
        ),
        "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate": caller(
            authority, stranger.issue("wrong", "caller.example")
        ),
        "PEER_DID_NOT_RETURN_A_CERTIFICATE: ": caller(authority),
        "WRONG_VERSION_NUMBER: ": None,
    }
    async with orchestrator(
        tmp_path,
        FakeGeneratorEngine(),
        ARBITRAGE_TLS_CERTIFICATE=str(certificate),
        ARBITRAGE_TLS_KEY=str(key),
        ARBITRAGE_TLS_CLIENT_CA=str(authority.path),
    ) as running:
        for number, tls in enumerate(cases.values(), start=1):
            await asyncio.to_thread(shake_hands, running.port, tls)
            async with asyncio.timeout(60):
                while await running.refused_count("tls_handshake") < number:
                    pass
            assert await running.refused_count("tls_handshake") == number
        good = await authority.client(authority.issue("good", "caller.example"))
        async with AsyncArbitrageClient(running.address, tls=good) as client:
            assert (await client.solve("1 + 1?", policy=DraftOnly())).steps
        written = await running.stopped()
    for cause in cases:
        assert written.count(f"refused (tls_handshake): {cause}") == 1, cause


def output_of(program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program whose standard error is read by `core_log`."""
    beginning = (
        "import logging, os, sys\n"
        "from services.rpc.core_log import core_log\n"
        "counted = []\n"
        "with core_log(counted.append):\n"
        "    logging.basicConfig(level='INFO', format='%(levelname)s %(name)s: %(message)s')\n"
    )
    text = beginning + "".join(f"    {line}\n" for line in program.splitlines())
    return subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_every_line_is_passed_on_at_its_level_also_the_last_one() -> None:
    done = output_of(
        "os.write(2, b'W1125 07:39:51.733251    4637 log.cc:102] careful\\n')\n"
        "os.write(2, b'half a ')\n"
        "os.write(2, b'line\\n\\xff\\n')\n"
        "print('from Python', file=sys.stderr)\n"
        "os.write(2, b'the end')"
    )
    assert done.returncode == 0
    lines = set(done.stderr.splitlines())
    assert lines == {
        "WARNING grpc.core: log.cc:102] careful",
        "WARNING grpc.core: half a line",
        "WARNING grpc.core: \\xff",
        "from Python",
        "WARNING grpc.core: the end",
    }


def test_nothing_is_lost_where_python_ends_with_an_error() -> None:
    done = output_of("os.write(2, b'before\\n' * 1000)\nraise RuntimeError('defect')")
    assert done.returncode == 1
    assert done.stderr.count("WARNING grpc.core: before") == 1000
    assert "RuntimeError: defect" in done.stderr


def test_a_crash_in_native_code_still_shows_where_python_was() -> None:
    done = output_of("import ctypes\nctypes.string_at(0)")
    assert done.returncode < 0
    assert "Fatal Python error: Segmentation fault" in done.stderr
    assert 'File "<string>", line' in done.stderr


def test_a_failed_handshake_is_told_without_its_line() -> None:
    done = output_of(
        "os.write(2, b'I1125 07:39:51.7    4637 ssl_transport_security.cc:2125] Handshake failed "
        "with error SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:"
        "WRONG_VERSION_NUMBER: Invalid certificate verification context\\n')\n"
        "import time\n"
        "while not counted:\n    time.sleep(0.01)\n"
        "print(counted, file=sys.stderr)"
    )
    assert done.stderr.splitlines() == [
        "['WRONG_VERSION_NUMBER: Invalid certificate verification context']"
    ]


@pytest.mark.slow
async def test_a_certificate_that_cannot_be_used_stops_the_program_with_one_line(
    tmp_path: Path,
) -> None:
    certificate, key = Authority(tmp_path).issue("server", "localhost")
    key.write_bytes(b"")
    variables = {
        "ARBITRAGE_DRAFT_ADDRESS": "127.0.0.1:1",
        "ARBITRAGE_TARGET_ADDRESS": "127.0.0.1:1",
        "ARBITRAGE_TLS_CERTIFICATE": str(certificate),
        "ARBITRAGE_TLS_KEY": str(key),
    }
    async with started("services.orchestrator", **variables) as process:
        code, written = await ended(process)
    assert code == 2
    assert written.endswith(
        f"ARBITRAGE_TLS_KEY: {key}: holds no key; give an unencrypted PEM private key, whole\n"
    )
    assert written.count("\n") == 1


# Native code may write while it holds the interpreter's lock, which the reader of its lines needs.
FLOOD = """
import ctypes
from services.rpc.core_log import core_log
native = ctypes.PyDLL(None)
with core_log(lambda cause: None):
    for _ in range(2_000):
        native.write(2, b"x" * 200 + b"\\n", 201)
print("went on")
"""


@pytest.mark.slow
async def test_native_code_that_writes_much_at_once_does_not_lock_the_program_up() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FLOOD), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(30):
            written, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert written == b"went on\n"


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["ARBITRAGE_API_KEYS_FILE", "ARBITRAGE_MODELS_TLS_CA"])
async def test_a_file_that_is_not_there_stops_the_program_with_one_line(
    setting: str, tmp_path: Path
) -> None:
    variables = {
        "ARBITRAGE_DRAFT_ADDRESS": "127.0.0.1:1",
        "ARBITRAGE_TARGET_ADDRESS": "127.0.0.1:1",
        setting: str(tmp_path / "nowhere"),
    }
    async with started("services.orchestrator", **variables) as process:
        code, written = await ended(process)
    assert code == 2
    assert f" ERROR arbitrage: {setting}: {tmp_path / 'nowhere'}: cannot be read" in written
    assert written.count("\n") == 1
