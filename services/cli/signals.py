"""Ends a command's work on Ctrl-C or SIGTERM, and at once where the signal comes again."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine

from services.cli.failures import SIGNAL_BASE


def run_until_signalled(
    work: Coroutine[None, None, int], *, exit_code_when_terminated: int = SIGNAL_BASE + 15
) -> int:
    """Runs `work` and returns its exit code, or that of the signal that ended it.

    The first signal cancels `work`, whose clean-up runs; the next one cancels the clean-up.
    """
    return asyncio.run(_until_signalled(work, exit_code_when_terminated))


async def _until_signalled(work: Coroutine[None, None, int], exit_code_when_terminated: int) -> int:
    task = asyncio.current_task()
    assert task is not None
    received: list[signal.Signals] = []

    def stop(signal_number: signal.Signals) -> None:
        received.append(signal_number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, stop, signal_number)
    try:
        return await work
    except asyncio.CancelledError:
        if not received:
            raise
        if received[0] is signal.SIGTERM:
            return exit_code_when_terminated
        return SIGNAL_BASE + received[0]
    finally:
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signal_number)
