"""Generates arbitrage/v1 from the protos: `python protos/generate.py [--check]`.

With `--check` nothing is written; the exit status says whether the checked-in code is what the
protos make. Nothing in arbitrage/v1 is written by hand.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGE = Path("arbitrage") / "v1"


def generate(out: Path) -> None:
    """Writes the messages, services and type stubs of every proto below `out`."""
    files = sorted(str(path) for path in (PROTOS / PACKAGE).glob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    outputs = [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    # Beside the running Python, so that it is found without an activated environment.
    plugin = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
    outputs += [f"--plugin=protoc-gen-mypy_grpc={plugin}", f"--mypy_grpc_out=quiet:{out}"]
    arguments = ["protoc", f"-I{PROTOS}", f"-I{well_known}", *outputs]
    if protoc.main([*arguments, *files]) != 0:
        raise SystemExit("protoc failed; its message is above")
    folder = out / PACKAGE
    (folder / "__init__.py").touch()
    for path in folder.glob("*_pb2_grpc.py*"):
        # A proto without a service makes an empty service module that nothing imports.
        if path.suffix == ".py" and "class " not in path.read_text():
            path.unlink()
            path.with_suffix(".pyi").unlink(missing_ok=True)


def stale_files(fresh: Path) -> list[str]:
    """Returns the names that differ between the checked-in code and `fresh`."""
    kept, made = ROOT / PACKAGE, fresh / PACKAGE
    names = {p.name for folder in (kept, made) for p in folder.iterdir() if p.is_file()}
    return sorted(name for name in names if _content(kept / name) != _content(made / name))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = stale_files(Path(folder))
    if stale:
        sys.stderr.write(f"not what the protos make: {', '.join(stale)}; run `make protos`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
