"""Makes a base image where none can be fetched: `python -m tests.images.base`.

Debian's own Python by debootstrap, under the name that tests build on. What the Dockerfile names is
an official image; a build on this one shows the same but for its Python's patch release.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.charts.tools import ROOT
from tests.images.buildah import buildah

HOME: Final = ROOT / ".images"
BASE: Final = "localhost/arbitrage-base"
_PACKAGES: Final = "ca-certificates,python3,python3-venv"


def main() -> None:
    """Makes it, unless it is there."""
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} is missing: apt-get install buildah debootstrap")
    if BASE in buildah("images", "--format", "{{.Name}}").split():
        return
    HOME.mkdir(exist_ok=True)
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


if __name__ == "__main__":
    main()
