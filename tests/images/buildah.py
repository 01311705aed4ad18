"""buildah without a container engine: images on plain folders, processes under chroot."""

from __future__ import annotations

import subprocess
from typing import Final

_STORAGE: Final = ("--storage-driver", "vfs")


class BuildFailed(Exception):
    """buildah ended with another code than 0; the message is the end of what it said."""


def buildah(*arguments: str) -> str:
    """Runs it and returns what it writes.

    Raises:
        BuildFailed
    """
    command = ["buildah", *_STORAGE, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise BuildFailed(f"{' '.join(arguments)}: {run.stdout[-2000:]}{run.stderr[-4000:]}")
    return run.stdout
