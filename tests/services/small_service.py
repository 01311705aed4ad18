"""A service as small as can be: it serves nothing, but starts, lives and ends like a real one.

`SMALL_SERVICE_FATE` says how: `serve`; `fail` ends before it serves; `stubborn` ignores SIGTERM;
`hang` never serves.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    """Lives until told to stop, then says so on standard output."""
    fate = os.environ["SMALL_SERVICE_FATE"]
    sys.stdout.write(f"starting with fate {fate}\n")
    sys.stdout.flush()
    if fate == "fail":
        sys.stderr.write("ARBITRAGE_MODEL: expected a folder, got 'nowhere'\n")
        sys.exit(2)
    if fate == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    if fate != "hang":
        _tell_ready(Path(os.environ["ARBITRAGE_READY_FILE"]))
    try:
        while True:
            time.sleep(60)
    finally:
        with Path(os.environ["SMALL_SERVICE_STOPS"]).open("a") as stops:
            stops.write(os.environ["SMALL_SERVICE_NAME"] + "\n")


def _tell_ready(ready_file: Path) -> None:
    ready = {"address": "127.0.0.1:1", "metrics_port": 2, "pid": os.getpid()}
    unfinished = ready_file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(ready))
    unfinished.rename(ready_file)


if __name__ == "__main__":
    main()
