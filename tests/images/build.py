"""Builds the images for CPU, all of them or those named: `python -m tests.images.build [NAME …]`.

On a base that is made here, Debian's own Python by debootstrap, since none can be fetched
everywhere. The Dockerfile names an official image; what is built on this one shows the same but for
its Python's patch release.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tests.charts.tools import ROOT
from tests.images.buildah import buildah
from tests.images.dockerfile import IMAGES, PATH

HOME: Final = ROOT / ".images"
BASE: Final = "localhost/arbitrage-base"
_PACKAGES: Final = "ca-certificates,python3,python3-venv"


def name_of(target: str) -> str:
    """Returns the name under which a target's image is kept."""
    return f"localhost/arbitrage-{target}"


def main() -> None:
    """Builds them one after the other."""
    named = sys.argv[1:] or IMAGES
    if unknown := set(named) - set(IMAGES):
        raise SystemExit(
            f"{', '.join(sorted(unknown))}: no such image; known are {', '.join(IMAGES)}"
        )
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} is missing: apt-get install buildah debootstrap")
    HOME.mkdir(exist_ok=True)
    _make_base()
    for target in named:
        started_s = time.monotonic()
        options = (f"--build-arg=BASE_IMAGE={BASE}", *_of_this_machine())
        context = ("--file", str(PATH), "--target", target, str(ROOT))
        buildah("bud", "--isolation", "chroot", "--tag", name_of(target), *options, *context)
        sys.stdout.write(f"{target}: built in {time.monotonic() - started_s:.0f} s\n")


def _make_base() -> None:
    """Makes it, unless it is there."""
    if BASE in buildah("images", "--format", "{{.Name}}").split():
        return
    root = HOME / "base"
    if not (root / "usr/bin/python3").exists():
        shutil.rmtree(root, ignore_errors=True)
        _bootstrap(root)
    container = buildah("from", "scratch").strip()
    buildah("add", "--quiet", container, str(root), "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(root)


def _bootstrap(root: Path) -> None:
    options = ("--variant=minbase", f"--include={_PACKAGES}")
    run = subprocess.run(
        ["debootstrap", *options, "bookworm", str(root)], stdout=sys.stderr, check=False
    )
    if run.returncode != 0:
        raise SystemExit("debootstrap could not make a base image; its log is above")
    # As in the official image, there is a `python`.
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    for cache in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / cache, ignore_errors=True)


def _of_this_machine() -> list[str]:
    """Where pip gets its packages from here, beside what the Dockerfile says."""
    options, lines = [], ["[global]"]
    if certificates := os.environ.get("PIP_CERT"):
        options.append(f"--volume={certificates}:/run/certificates.crt:ro")
        lines.append("cert = /run/certificates.crt")
    if index := os.environ.get("PIP_INDEX_URL"):
        options.append(f"--build-arg=PIP_INDEX_URL={index}")
    if wheels := os.environ.get("PIP_FIND_LINKS"):
        options.append(f"--volume={wheels}:/run/wheels:ro")
        options.append("--build-arg=TORCH_WHEELS=/run/wheels")
    path = HOME / "pip.conf"
    path.write_text("\n".join(lines) + "\n")
    return [*options, f"--volume={path}:/etc/pip.conf:ro"]


if __name__ == "__main__":
    main()
