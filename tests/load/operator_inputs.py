"""What an operator types: settings in the environment, and the command line."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout

from services.cli.__main__ import main
from services.generator.settings import GeneratorSettings
from services.orchestrator.settings import OrchestratorSettings
from services.prm.settings import PrmSettings
from services.router.settings import RouterSettings
from services.rpc.settings import PREFIX, ServerSettings, SettingsError, read_settings
from tests.load.driver import ACCEPTED, Boundary, Wrong, legible
from tests.load.odd_values import OddValues


def inputs() -> list[Boundary]:
    """Returns the boundaries."""
    return [
        *(_settings(kind) for kind in _SETTINGS),
        Boundary("command line", 4, _arguments, _run_command),
    ]


_SETTINGS = (OrchestratorSettings, GeneratorSettings, PrmSettings, RouterSettings)
_NEEDED = {
    OrchestratorSettings: {"draft_address": "d:1", "target_address": "t:1"},
    GeneratorSettings: {"model": "tiny", "role": "draft"},
    PrmSettings: {"model": "tiny"},
    RouterSettings: {"model": "tiny"},
}


def _settings(kind: type[ServerSettings]) -> Boundary:
    fields = list(kind.model_fields)

    def draw(odd: OddValues) -> Mapping[str, str]:
        environ = {PREFIX + name.upper(): value for name, value in _NEEDED[kind].items()}
        for _ in range(odd.coin.randint(0, 4)):
            name = odd.one_of(fields) if odd.chance(0.85) else odd.text(may_be_broken=True)
            environ[PREFIX + (name.upper() if odd.chance(0.9) else name)] = _variable(odd)
        if odd.chance(0.1):
            environ.pop(odd.one_of(list(environ)))
        return environ

    def attempt(environ: Mapping[str, str]) -> str:
        try:
            settings = read_settings(kind, environ)
        except SettingsError as error:
            for problem in error.problems:
                if not legible(problem).startswith(PREFIX):
                    raise Wrong(f"the problem names no variable: {problem}") from None
            return type(error).__name__
        # What a program takes from its settings before anything else can go wrong.
        for name in dir(kind):
            if isinstance(getattr(kind, name), property) and not name.startswith(("_", "model_")):
                getattr(settings, name)
        return ACCEPTED

    return Boundary(kind.__name__, 5, draw, attempt)


def _variable(odd: OddValues) -> str:
    match odd.coin.randrange(5):
        case 0:
            return str(odd.integer(-(10**30), 10**30))
        case 1:
            return str(odd.real())
        case 2:
            return str(odd.coin.randint(0, 99_999))
        case _:
            # An environment holds no NUL; bytes that are not UTF-8 arrive as surrogates.
            return odd.text(may_be_broken=True).replace("\0", "")


_NOWHERE = "no-such-pack"
_OPTIONS = {
    "ask": (
        *("--policy", "--threshold", "--target-share", "--policy-seed", "--token-count"),
        *("--max-steps", "--max-tokens", "--max-step-tokens", "--max-target-steps"),
        *("--time-limit", "--temperature", "--top-p", "--top-k", "--seed", "--timeout"),
        *("--allow-degraded", "--json", "--pack"),
    ),
    "demo": ("--problems", "--policies", "--time-limit", "--json", "--pack"),
    "up": (
        *("--ports", "--draft-port", "--orchestrator-port", "--threads", "--prefix-cache-mib"),
        *("--set", "--run-folder", "--host", "--pack"),
    ),
    "models": ("list", "verify"),
}
# Those that are told apart without a look at any name server.
_HOSTS = ("127.0.0.1", "::1", "n" * 300, ".", "\ud800", "a\0b")


def _arguments(odd: OddValues) -> list[str]:
    command = odd.one_of(tuple(_OPTIONS))
    arguments = [command]
    if command == "ask" and odd.chance(0.95):
        arguments.append("1 + 1?" if odd.chance(0.6) else odd.text(may_be_broken=True))
    for _ in range(odd.coin.randint(0, 3)):
        option = odd.one_of(_OPTIONS[command])
        arguments.append(option)
        if option == "--host":
            arguments.append(odd.one_of(_HOSTS))
        elif option == "--policy" and odd.chance(0.7):
            arguments.append(odd.one_of(("random", "rsd", "oracle", "first_token_entropy")))
        elif odd.chance(0.9):
            arguments.append(_variable(odd))
    if odd.chance(0.05):
        arguments.insert(odd.coin.randrange(len(arguments) + 1), odd.text(may_be_broken=True))
    if odd.chance(0.05):
        arguments.append("--help")
    # So that no input, however good, starts a deployment.
    return arguments if command == "models" else [*arguments, f"--pack={_NOWHERE}"]


def _run_command(arguments: list[str]) -> str:
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    kept, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(b"\xff1 + 1?"), "utf-8")
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(arguments)
    except SystemExit as end:  # of --help
        code = int(str(end.code))
    finally:
        sys.stdin = kept
    out.flush()
    err.flush()
    said = err.buffer.getvalue().decode()
    if code == 0 and not said:
        return ACCEPTED
    if code != 2:
        raise Wrong(f"exit code {code}: {said}")
    if not said.endswith("\n") or not legible(said[:-1]).isprintable():
        raise Wrong(f"the refusal is not one line: {said!r}")
    return "exit code 2"
