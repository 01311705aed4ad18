"""Runs one service so that it never outlives the process that started it.

`python -m services.cli.child PARENT_PID MODULE` runs MODULE as `python -m MODULE` would. The
parent holds the other end of standard input and writes nothing, so end of file means that it is
gone, however it went. On Linux the kernel also kills the process at once, which works even while
native code holds the interpreter.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_GRACE_S = 5.0
_ORPHANED = 1


def main() -> None:
    """Ties this process to its parent and becomes the named module."""
    parent_pid, module = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the kernel was asked to watch it.
    if os.getppid() != parent_pid:
        sys.exit(_ORPHANED)
    threading.Thread(target=_stop_when_orphaned, name="orphan-watch", daemon=True).start()
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _stop_when_orphaned() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(_ORPHANED)


if __name__ == "__main__":
    main()
