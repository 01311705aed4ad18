"""`python -m tools.lock`: what the images install, to the byte, in `locks/`.

Each file has every package of an image with the hashes of its files, at the versions of
`constraints.txt`. torch is apart: its builds for CPU and for CUDA are other files, and what only
the latter needs is not in the former's image.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
LOCKS: Final = ROOT / "locks"
# Of each lock, the project's extras.
EXTRAS: Final[Mapping[str, tuple[str, ...]]] = {
    "orchestrator": ("cli", "tracing"),
    "gateway": ("gateway", "tracing"),
    "generator": ("cli", "models", "tracing"),
    # PRM and router.
    "judge": ("cli", "models", "tracing", "kserve", "s3", "gcs"),
    "training": ("training", "tracing", "s3", "gcs"),
}
# And packages of their own: what builds the project, and what lists what an image contains.
TOOLS: Final[Mapping[str, tuple[str, ...]]] = {
    "build": ("setuptools>=77", "wheel"),
    "sbom": ("cyclonedx-bom>=7",),
}
# torch and what its build for CUDA needs; without torch, the build for CPU needs nothing more.
CUDA: Final = "torch-cuda"
_TORCH: Final = "torch==2.13.0"
_OF_CUDA: Final = ("torch", "triton", "cuda-", "nvidia-")


def main() -> None:
    """Writes every lock anew."""
    LOCKS.mkdir(exist_ok=True)
    needed = {line.split("==")[0] for line in _compiled(_TORCH, "--no-header", "--no-annotate")}
    ours = {name for name in needed if name.startswith(_OF_CUDA)}
    for name, extras in EXTRAS.items():
        _write(name, f"arbitrage[{','.join(extras)}] @ .", _omit({*ours, "arbitrage"}))
    for name, requirements in TOOLS.items():
        _write(name, "\n".join(requirements))
    _write(CUDA, _TORCH, _omit(needed - ours))


def _omit(names: set[str]) -> tuple[str, ...]:
    return tuple(option for name in sorted(names) for option in ("--no-emit-package", name))


def _write(name: str, requirements: str, options: tuple[str, ...] = ()) -> None:
    lines = _compiled(requirements, "--no-header", "--generate-hashes", *options)
    head = "# Made by `make lock`.\n"
    (LOCKS / f"{name}.txt").write_text(head + "\n".join(lines) + "\n")


def _compiled(requirements: str, *options: str) -> list[str]:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", *options),
            *("--constraint", "constraints.txt", "--python-version", "3.11"),
            *("--python-platform", "x86_64-manylinux_2_28"),
        ],
        input=requirements,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if run.returncode != 0:
        raise SystemExit(f"{requirements}: {run.stderr}")
    return run.stdout.splitlines()


if __name__ == "__main__":
    main()
