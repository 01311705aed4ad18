"""The house keeps its own rules: floors, stubs, and what the slim image may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def modules_loaded_by(statement: str) -> set[str]:
    """Returns the top-level modules that a fresh interpreter has after `statement`."""
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(run.stdout.split())


def test_core_needs_nothing_but_the_standard_library() -> None:
    modules = sorted((ROOT / "arbitrage" / "core").glob("*.py"))
    names = [f"arbitrage.core.{path.stem}" for path in modules if path.stem != "__init__"]
    assert len(names) > 8
    loaded = modules_loaded_by(f"import {', '.join(names)}")
    allowed = sys.stdlib_module_names | {"arbitrage", "__main__"}
    # Loaded by the interpreter itself at start, for editable installs.
    bare = modules_loaded_by("pass")
    assert loaded - allowed - bare == set()


@pytest.mark.parametrize("module", ["services.orchestrator.__main__", "arbitrage.client"])
def test_orchestrator_and_client_load_no_torch(module: str) -> None:
    loaded = modules_loaded_by(f"import {module}")
    assert "grpc" in loaded
    assert loaded & {"torch", "transformers"} == set()


def test_the_client_needs_only_the_base_installation() -> None:
    loaded = modules_loaded_by("import arbitrage.client")
    assert loaded & {"pydantic", "rich", "prometheus_client"} == set()


def test_programs_load_nothing_of_opentelemetry_unless_they_are_told_to() -> None:
    plumbing = "services.rpc.program, services.rpc.clients, services.rpc.handlers"
    assert "opentelemetry" not in modules_loaded_by(f"import {plumbing}")
    # The Redis client loads the part for metrics, wherever it finds it.
    ours = "{'services.rpc.otlp', 'opentelemetry.exporter', 'opentelemetry.sdk.trace'}"
    modules_loaded_by(
        f"import services.orchestrator.__main__; assert not {ours} & {{*sys.modules}}"
    )


def test_the_stubs_are_what_the_protos_make() -> None:
    command = [sys.executable, str(ROOT / "protos" / "generate.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_importing_a_program_does_nothing() -> None:
    for path in ROOT.glob("services/*/__main__.py"):
        guarded = [
            node
            for node in ast.parse(path.read_text()).body
            if not isinstance(
                node,
                ast.Import
                | ast.ImportFrom
                | ast.FunctionDef
                | ast.AsyncFunctionDef
                | ast.ClassDef
                | ast.Assign
                | ast.AnnAssign,
            )
            and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        ]
        assert all(isinstance(node, ast.If) for node in guarded), path
