"""Reads what gRPC's C core writes to standard error, which is all it tells of failed handshakes.

A caller without a certificate, with an expired one or one of another CA, or that speaks plaintext,
never becomes a call: no interceptor, no handler and no metric of grpcio 1.80 sees it. Channelz
counts calls only, and the certificate fetcher learns that a handshake begins, not how it ends. The
core writes one line for each, `I… ssl_transport_security.cc:2125] Handshake failed with error …`,
unless `GRPC_VERBOSITY` is ERROR or NONE. So file descriptor 2 becomes a pipe whose other end is
read here, and `sys.stderr` a writer to where descriptor 2 led before.

Python's own tracebacks, also those of `faulthandler` after a crash in native code, go there
directly. Native code's last words before it aborts the process take the way through the pipe, and
are lost where the abort is faster than the reader.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

_log = logging.getLogger("grpc.core")
_STDERR = 2
_LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
# `I1125 07:39:51.733251    4637 ssl_transport_security.cc:2125] text`
_LINE = re.compile(r"([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (\S+\] .*)")
_FAILED = re.compile(r"Handshake failed with error .*?([A-Z_]+: [^:]*)$")
_DRAIN_TIMEOUT_S = 2.0


@contextmanager
def core_log(on_failed_handshake: Callable[[str], None]) -> Iterator[None]:
    """Passes on what native code writes to standard error, through logging, while it is entered.

    A failed handshake is told to `on_failed_handshake` instead, with its cause. It may be one that
    this process began as a client.
    """
    sys.stderr.flush()
    real = os.dup(_STDERR)
    reading, writing = os.pipe()
    os.dup2(writing, _STDERR)
    os.close(writing)
    # Its reader needs the interpreter's lock, which who writes may hold: rather lose lines than
    # wait for each other.
    os.set_blocking(_STDERR, False)
    sys.stderr = open(  # noqa: SIM115 - it lives as long as the process
        real, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    faulthandler.enable(sys.stderr)
    reader = Thread(
        target=_read, args=(reading, on_failed_handshake), name="grpc-core-log", daemon=True
    )
    reader.start()
    try:
        yield
    finally:
        # The last writer of the pipe: its reader comes to the end of what was written.
        os.dup2(real, _STDERR)
        reader.join(_DRAIN_TIMEOUT_S)


def _read(reading: int, on_failed_handshake: Callable[[str], None]) -> None:
    with open(reading, encoding="utf-8", errors="backslashreplace") as lines:
        for line in lines:
            text = line.rstrip("\n")
            failed = _FAILED.search(text)
            if failed:
                on_failed_handshake(failed[1])
                continue
            known = _LINE.match(text)
            if known:
                _log.log(_LEVELS[known[1]], "%s", known[2])
            elif text:
                _log.warning("%s", text)
