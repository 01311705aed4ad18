"""Runs images as a cluster would: as their user, on a root that is read only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from tests.images.build import name_of
from tests.images.buildah import buildah

# What makes a root of the image's files: read only but for /tmp, with the host's /proc and /dev.
_ENTER: Final = """
set -e
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
mount -t proc proc "$1/proc"
mount --bind /dev "$1/dev"
user="$2"; root="$1"; shift 2
exec chroot --userspec="$user" "$root" "$@"
"""


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: its files, and what it says of itself."""

    name: str
    root: Path
    config: Mapping[str, Any]
    mib: float

    @property
    def command(self) -> list[str]:
        """What a container of it runs."""
        return list(self.config["Cmd"])

    def entered(self, command: list[str], environ: Mapping[str, str]) -> list[str]:
        """Returns a command line that runs a command in it, on the host's network."""
        said = [*self.config["Env"], *(f"{name}={value}" for name, value in environ.items())]
        enter = ["unshare", "--mount", "--fork", "--kill-child", "sh", "-c", _ENTER, "enter"]
        user, cwd = self.config["User"], self.config["WorkingDir"]
        return [
            *enter,
            *(str(self.root), user),
            *("/usr/bin/env", "-i", f"--chdir={cwd}", *said),
            *command,
        ]

    def run(self, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in it to its end."""
        entered = self.entered(list(command), environ)
        return subprocess.run(entered, capture_output=True, text=True, check=False, timeout=300)

    @contextmanager
    def started(self, log: Path, environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """Runs its own command until the block is left."""
        with log.open("wb") as written:
            process = subprocess.Popen(
                self.entered(self.command, environ),
                stdout=written,
                stderr=written,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            # A process that becomes another user no longer ends with its parent.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@cache
def opened(target: str) -> Image:
    """Gives access to the files of an image that `python -m tests.images.build` has built."""
    name = name_of(target)
    container = buildah("from", name).strip()
    root = Path(buildah("mount", container).strip())
    config = json.loads(buildah("inspect", "--type", "image", name))["OCIv1"]["config"]
    used = subprocess.run(
        ["du", "--summarize", "--block-size=1K", str(root)], capture_output=True, check=True
    )
    return Image(target, root, config, int(used.stdout.split()[0]) / 1024)


def remove_containers() -> None:
    """Unmounts what was built; the images stay for the next time."""
    buildah("rm", "--all")
