"""Everything that is read in one process: answers of servers, settings, files and command lines.

Each boundary has one kind of error; another one, a hang, or a message nobody can read is a
finding.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry

from arbitrage.core.errors import ArbitrageError, DraftUnavailable, RouterUnavailable
from arbitrage.core.steps import Score
from arbitrage.status import DETAILS_KEY, DOMAIN, from_rpc_error, to_status
from arbitrage.v1 import feedback_pb2, generator_pb2, orchestrator_pb2, prm_pb2, router_pb2
from arbitrage.v1.error_reason_pb2 import ErrorReason
from arbitrage.v1.trajectory_pb2 import (
    SOURCE_DRAFT,
    SOURCE_TARGET,
    STOP_REASON_SEPARATOR,
    STOP_REASON_STEP_LENGTH,
)
from arbitrage.wire import capabilities_from_proto, event_from_proto
from router_training.config import parsed_overrides, read_config
from router_training.errors import ConfigInvalid, DatasetInvalid
from router_training.feedback import rows_from_feedback
from router_training.rows import RowFolder
from services.cli.__main__ import main
from services.cli.render import StepLines, event_as_json
from services.engines.loading import LoadedModel, ModelKind, ModelLoadError, load_model
from services.engines.packs import PackError, find_pack, load_pack, resolve_model, verify_pack
from services.engines.revisions import RevisionError, RevisionStore
from services.engines.router_format import FormatError, read_prm_format, read_router_format
from services.engines.transformers_generator import TransformersGenerator
from services.generator.settings import GeneratorSettings
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.telemetry import FeedbackMetrics
from services.prm.settings import PrmSettings
from services.router.settings import RouterSettings
from services.rpc import convert
from services.rpc.calls import ModelCall
from services.rpc.feedback_log import read_feedback
from services.rpc.model_program import made_ready
from services.rpc.program import StartError
from services.rpc.settings import PREFIX, ServerSettings, SettingsError, read_settings
from tests.load.driver import ACCEPTED, Boundary, Wrong, legible
from tests.load.odd_values import OddValues

_ROOT = Path(__file__).resolve().parents[2]
_TINY = _ROOT / "model_packs" / "tiny"
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)


def readers(folder: Path) -> list[Boundary]:
    """Returns the boundaries; files are written to `folder`."""
    return [
        Boundary("server events", 10, _event, _read_event),
        Boundary("server capabilities", 3, _capabilities, _read_capabilities),
        Boundary("server statuses", 12, _status, _read_status),
        Boundary("model answers", 10, _answer, _read_answer),
        Boundary("converted messages", 10, _core_message, _convert),
        *(_settings(kind) for kind in _SETTINGS),
        _pack_manifests(folder / "pack"),
        _pack_names(folder / "packs"),
        _formats(folder / "formats"),
        _revisions(folder / "revisions"),
        _checkpoints(folder / "checkpoint"),
        _feedback(folder / "feedback"),
        _configs(folder / "configs"),
        Boundary("training overrides", 2, _overrides, _read_overrides),
        Boundary("command line", 4, _arguments, _run_command),
    ]


# What servers send


def _event(odd: OddValues) -> orchestrator_pb2.GenerateSolutionResponse:
    return odd.message(orchestrator_pb2.GenerateSolutionResponse)


def _read_event(message: orchestrator_pb2.GenerateSolutionResponse) -> str:
    try:
        event = event_from_proto(message)
    except ArbitrageError as error:
        legible(str(error))
        return error.reason
    for line in StepLines().lines(event):
        str(line)
    json.loads(event_as_json(event))
    return ACCEPTED


def _capabilities(odd: OddValues) -> orchestrator_pb2.GetCapabilitiesResponse:
    return odd.message(orchestrator_pb2.GetCapabilitiesResponse)


def _read_capabilities(message: orchestrator_pb2.GetCapabilitiesResponse) -> str:
    try:
        capabilities_from_proto(message)
    except ArbitrageError as error:
        return error.reason
    return ACCEPTED


class FailedCall(grpc.RpcError):
    """A call that ended with what a server may send."""

    def __init__(self, code: grpc.StatusCode, details: str | None, metadata: Any) -> None:
        self._code, self._details, self._metadata = code, details, metadata

    def __repr__(self) -> str:
        return f"FailedCall({self._code}, {self._details!r}, {self._metadata!r})"

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata


def _status(odd: OddValues) -> FailedCall:
    code = odd.one_of(list(grpc.StatusCode))
    details = odd.one_of((None, odd.text(), "Received message larger than max (2 vs. 1)"))
    status = odd.message(status_pb2.Status)
    if odd.chance(0.8):
        status.code = code.value[0]
    for _ in range(odd.coin.randint(0, 3)):
        kinds = (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, status_pb2.Status)
        detail = _error_info(odd) if odd.chance(0.6) else odd.message(odd.one_of(kinds[1:]))
        status.details.add().Pack(detail)
    received = status.SerializeToString()
    if odd.chance(0.2):
        received = odd.changed_bytes(received)
    metadata = [(DETAILS_KEY, received), (odd.text(), odd.text())]
    return FailedCall(code, details, odd.one_of((None, (), metadata, metadata, metadata)))


def _error_info(odd: OddValues) -> Any:
    reasons = [name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()]  # noqa: SIM118 - no dict
    return error_details_pb2.ErrorInfo(
        reason=odd.one_of((odd.text(), *reasons)),
        domain=odd.one_of((DOMAIN, DOMAIN, DOMAIN, odd.text())),
        metadata={
            odd.one_of(("field", "value", "problem", "fix", odd.text())): odd.text()
            for _ in range(odd.coin.randint(0, 5))
        },
    )


def _read_status(call: FailedCall) -> str:
    error = from_rpc_error(call, DraftUnavailable)
    if not isinstance(error, ArbitrageError):
        raise Wrong(f"a status became {type(error).__name__}")
    # An orchestrator sends on what a model told it.
    to_status(error).SerializeToString()
    return error.reason


_ANSWERS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (generator_pb2.GeneratedStep, convert.generated_step_from_proto),
    (router_pb2.EstimateAdvantageResponse, convert.advantage_from_proto),
    (prm_pb2.ScoreStepsResponse, convert.reward_from_proto),
    (router_pb2.GetRouterResponse, convert.router_from_proto),
)


_GOOD_ROUTER = router_pb2.GetRouterResponse(
    default_threshold=0.4,
    calibration=[
        router_pb2.CalibrationPoint(threshold=x / 4, target_share=1 - x / 4) for x in (1, 2, 3)
    ],
    annotated=True,
    score_rule="softmax",
)


def _answer(odd: OddValues) -> tuple[int, Any]:
    index = odd.coin.randrange(len(_ANSWERS))
    kind = _ANSWERS[index][0]
    if kind is router_pb2.GetRouterResponse and odd.chance(0.7):
        return index, odd.changed_message(_GOOD_ROUTER)
    return index, odd.message(kind)


def _read_answer(given: tuple[int, Any]) -> str:
    index, message = given
    try:
        value = ModelCall(RouterUnavailable, 1.0).answer(_ANSWERS[index][1], message)
    except ArbitrageError as error:
        legible(str(error))
        return error.reason
    if isinstance(message, router_pb2.GetRouterResponse):
        # What the orchestrator does with a description as long as that router answers.
        for share in (0.0, 0.3, 1.0):
            if not 0.0 <= value.calibration.threshold_for(share) <= 1.0:
                raise Wrong(f"the table gives no threshold for {share}")
        metrics = FeedbackMetrics(CollectorRegistry(), lambda token_count: None)
        metrics.observe(Score(0.3, value.model), 0.1, value)
    return ACCEPTED


# Conversion


_CONVERSIONS: tuple[tuple[Any, Callable[[Any], Any], Callable[[Any], Any]], ...] = (
    (
        generator_pb2.GenerateStepRequest,
        lambda message: convert.step_request_from_proto(message, 7),
        convert.step_request_to_proto,
    ),
    (
        generator_pb2.GeneratedStep,
        convert.generated_step_from_proto,
        convert.generated_step_to_proto,
    ),
    (router_pb2.GetRouterResponse, convert.router_from_proto, convert.router_to_proto),
)


def _core_message(odd: OddValues) -> tuple[int, Any]:
    index = odd.coin.randrange(len(_CONVERSIONS))
    message = odd.message(_CONVERSIONS[index][0])
    if isinstance(message, generator_pb2.GenerateStepRequest):
        # Most draws are refused for these; what comes after them is to be tried too.
        message.sampling.temperature = odd.coin.random()
        message.sampling.top_p = odd.coin.random()
        message.time_limit.nanos = odd.coin.randrange(10**9)
        message.time_limit.seconds = odd.coin.randrange(86_400)
        del message.steps[3:]
        for step in message.steps:
            step.source = odd.one_of((SOURCE_DRAFT, SOURCE_TARGET))
            step.stop_reason = odd.one_of((STOP_REASON_SEPARATOR, STOP_REASON_STEP_LENGTH))
    elif isinstance(message, router_pb2.GetRouterResponse):
        message = odd.changed_message(_GOOD_ROUTER)
    return index, message


def _convert(given: tuple[int, Any]) -> str:
    index, message = given
    _, from_proto, to_proto = _CONVERSIONS[index]
    try:
        value = from_proto(message)
    except ArbitrageError as error:
        legible(str(error))
        return error.reason
    again = to_proto(value)
    # What a message leaves to the receiver is filled in once; after that nothing changes any more.
    if again != to_proto(from_proto(again)) or from_proto(again) != value:
        raise Wrong(f"{value!r} is not the same after the way to a message and back: {again!r}")
    return ACCEPTED


# Settings

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


# Files


def _document(odd: OddValues, good: Any) -> bytes:
    """Returns a JSON document: a good one changed, an odd one, or what only looks like one."""
    match odd.coin.choices(("changed", "odd", "bytes", "deep", "number"), (70, 15, 12, 1, 2))[0]:
        case "changed":
            return json.dumps(odd.changed_json(good)).encode()
        case "odd":
            return json.dumps(odd.json()).encode()
        case "bytes":
            return odd.changed_bytes(json.dumps(good).encode())
        case "deep":
            return b'{"format_version": 1, "x": ' + b"[" * 100_000
        case _:
            key = odd.one_of([key for key in good if isinstance(good[key], int | float)] or ["x"])
            return json.dumps({**good, key: 0}).encode().replace(b": 0", b": " + b"9" * 5_000, 1)


def _pack_manifests(folder: Path) -> Boundary:
    good = json.loads((_TINY / "pack.json").read_text())
    small = {**good, "models": {"draft": good["models"]["draft"]}, "files": good["files"][:2]}
    (folder / "draft").mkdir(parents=True)
    for name in ("config.json", "generation_config.json"):
        (folder / "draft" / name).write_bytes((_TINY / "draft" / name).read_bytes())

    def draw(odd: OddValues) -> bytes:
        if odd.chance(0.3):
            # Paths and numbers of files are what an attacker would choose.
            entry: dict[str, Any] = dict(odd.one_of(small["files"]))
            entry["path"] = odd.one_of(("draft/", "", "/", "../")) + odd.text()
            entry["size_bytes"] = odd.integer(-1, 2**70)
            return json.dumps({**small, "files": [*small["files"], entry]}).encode()
        return _document(odd, small)

    def attempt(content: bytes) -> str:
        (folder / "pack.json").write_bytes(content)
        try:
            pack = load_pack(folder)
            for role in pack.models:
                pack.model_folder(role)
        except PackError as error:
            legible(str(error))
            return type(error).__name__
        inside = os.path.realpath(folder)
        for path in [
            *(model.path for model in pack.models.values()),
            *(f.path for f in pack.files),
        ]:
            if not Path(os.path.normpath(folder / path)).is_relative_to(inside):
                raise Wrong(f"{path!r} leads out of the pack")
        damages = verify_pack(pack)
        for damage in damages:
            legible(str(damage))
        return "damaged" if damages else ACCEPTED

    return Boundary("pack.json", 8, draw, attempt)


def _pack_names(folder: Path) -> Boundary:
    folder.mkdir()
    (folder / "tiny").symlink_to(_TINY)

    def draw(odd: OddValues) -> str:
        name = odd.text(may_be_broken=True)
        return odd.one_of(
            (name, f"tiny/{name}", f"{name}/draft", f"./{name}", "tiny", "tiny/draft")
        )

    def attempt(name: str) -> str:
        outcome = ACCEPTED
        for find in (find_pack, resolve_model):
            try:
                find(name, [folder])
            except PackError as error:
                legible(str(error))
                outcome = type(error).__name__
        return outcome

    return Boundary("pack names", 2, draw, attempt)


def _formats(folder: Path) -> Boundary:
    folder.mkdir()
    good = {
        name: json.loads((_TINY / name.removesuffix(".json") / name).read_text())
        for name in ("router.json", "prm.json")
    }

    def draw(odd: OddValues) -> tuple[str, bytes]:
        name = odd.one_of(("router.json", "router.json", "prm.json"))
        return name, _document(odd, good[name])

    def attempt(given: tuple[str, bytes]) -> str:
        name, content = given
        path = folder / name
        path.write_bytes(content)
        try:
            if name == "prm.json":
                read_prm_format(path)
                return ACCEPTED
            known = read_router_format(path)
        except FormatError as error:
            legible(str(error))
            return type(error).__name__
        count = known.score_rule.logit_count(known.label_count)
        if count < 1_000 and not 0.0 <= known.score_rule.score([0.5] * count) <= 1.0:
            raise Wrong("the score is no probability")
        return ACCEPTED

    return Boundary("router.json and prm.json", 8, draw, attempt)


def _revisions(folder: Path) -> Boundary:
    folder.mkdir()
    checkpoint = folder / "made"
    checkpoint.mkdir()
    (checkpoint / "router.json").write_text("{}")
    place, cache = folder / "place", folder / "cache"
    store = RevisionStore(str(place))
    revision = store.add(checkpoint)
    store.point_to(revision, {"why": "first"})
    store.point_to(revision, {"why": "second"})
    paths = {
        "current.json": place / "current.json",
        "manifest": place / "revisions" / f"{revision}.json",
    }
    good = {name: path.read_bytes() for name, path in paths.items()}

    def draw(odd: OddValues) -> tuple[str, bytes]:
        name = odd.one_of(tuple(paths))
        if name == "manifest" and odd.chance(0.5):
            names = {odd.text(may_be_broken=True): odd.one_of(("0" * 64, odd.json()))}
            return name, json.dumps({"sha256": names}).encode()
        return name, _document(odd, json.loads(good[name]))

    def attempt(given: tuple[str, bytes]) -> str:
        name, content = given
        paths[name].write_bytes(content)
        try:
            known = RevisionStore(str(place))
            known.history()
            current = known.current()
            if current is not None:
                known.fetch(current, cache)
            known.point_to(revision, {})
            known.rollback()
            return ACCEPTED
        except RevisionError as error:
            legible(str(error))
            return type(error).__name__
        finally:
            for name, path in paths.items():
                path.write_bytes(good[name])

    return Boundary("revisions", 8, draw, attempt)


def _checkpoints(folder: Path) -> Boundary:
    folder.mkdir()
    good = {name: (_TINY / "draft" / name).read_bytes() for name in _MODEL_FILES}
    for name, content in good.items():
        (folder / name).write_bytes(content)

    def draw(odd: OddValues) -> tuple[str, bytes]:
        name = odd.one_of(("config.json", *_MODEL_FILES))
        if name == "model.safetensors":
            # Its header is JSON behind its own length; the rest are weights.
            length = int.from_bytes(good[name][:8], "little")
            header, weights = good[name][8 : 8 + length], good[name][8 + length :]
            changed = _document(odd, json.loads(header))
            size = len(changed) if odd.chance(0.8) else odd.integer(0, 2**64 - 1)
            return name, size.to_bytes(8, "little") + changed + weights
        return name, _document(odd, json.loads(good[name]))

    def attempt(given: tuple[str, bytes]) -> str:
        name, content = given
        (folder / name).write_bytes(content)
        try:
            loaded = load_model(str(folder), ModelKind.CAUSAL_LM)
            asyncio.run(_written_once(loaded))
        except (ModelLoadError, StartError) as error:
            legible(str(error), line_count=20)
            return type(error).__name__
        finally:
            (folder / name).write_bytes(good[name])
        return ACCEPTED

    return Boundary("checkpoint files", 0.4, draw, attempt)


async def _written_once(loaded: LoadedModel) -> None:
    """Does with a model what a program does before it serves."""
    engine = TransformersGenerator(loaded)
    try:
        await made_ready(engine)
    finally:
        await engine.close()


def _feedback(folder: Path) -> Boundary:
    folder.mkdir()
    path = folder / "feedback-1.jsonl"
    step = {"text": "a", "stop_reason": "STOP_REASON_SEPARATOR", "token_count": 3}
    good = {
        "request_id": "r",
        "observed_at": "2025-01-01T00:00:00Z",
        "problem": "1 + 1?",
        "steps": [{"text": "b", "source": "SOURCE_DRAFT", "stop_reason": "STOP_REASON_SEPARATOR"}],
        "draft_step": step,
        "target_steps": [step],
        "draft_score": 0.25,
        "target_scores": [0.75],
        "router_score": 0.5,
        "propensity": 0.5,
        "sampling": {"temperature": 0.5, "seed": "7"},
    }
    assert set(good) <= set(feedback_pb2.ObservedStep.DESCRIPTOR.fields_by_name)

    def draw(odd: OddValues) -> bytes:
        lines = [json.dumps(good).encode(), _document(odd, good)]
        odd.coin.shuffle(lines)
        return b"\n".join(lines) + odd.one_of((b"\n", b""))

    def attempt(content: bytes) -> str:
        path.write_bytes(content)
        try:
            for _ in read_feedback(folder):
                pass
        except ValueError as error:
            if str(path) not in legible(str(error)):
                raise Wrong(f"the error names no file: {error}") from error
            return type(error).__name__
        rows = folder / "rows"
        try:
            rows_from_feedback(folder, RowFolder(rows))
        except DatasetInvalid as error:
            legible(str(error))
            return type(error).__name__
        finally:
            for part in rows.glob("*"):
                part.unlink()
        return ACCEPTED

    return Boundary("feedback", 4, draw, attempt)


def _configs(folder: Path) -> Boundary:
    folder.mkdir()
    path = folder / "config.toml"
    text = (_ROOT / "router_training" / "configs" / "tiny.toml").read_text(encoding="utf-8")
    good = tomllib.loads(text)

    def draw(odd: OddValues) -> bytes:
        match odd.coin.choices(("changed", "odd", "bytes", "deep"), (70, 10, 19, 1))[0]:
            case "changed":
                return _toml(odd.changed_json(good)).encode("utf-8", "surrogatepass")
            case "odd":
                return _toml(odd.json()).encode("utf-8", "surrogatepass")
            case "bytes":
                return odd.changed_bytes(text.encode())
            case _:
                return b"work = " + b"[" * odd.one_of((50, 500, 5_000))

    def attempt(content: bytes) -> str:
        path.write_bytes(content)
        try:
            read_config(path)
        except ConfigInvalid as error:
            for line in str(error).splitlines():
                legible(line)
            return type(error).__name__
        return ACCEPTED

    return Boundary("training configuration", 6, draw, attempt)


def _toml(value: Any) -> str:
    """Returns a document with the keys of `value` at its top."""
    fields = value if isinstance(value, dict) else {"work": value}
    return "\n".join(f"{_toml_text(key)} = {_toml_value(inner)}" for key, inner in fields.items())


def _toml_value(value: Any) -> str:
    match value:
        case dict():
            pairs = (f"{_toml_text(key)} = {_toml_value(inner)}" for key, inner in value.items())
            return f"{{ {', '.join(pairs)} }}"
        case [[*inner]]:
            # Without recursion: some lists in lists are deeper than this program may call.
            depth = 1
            while len(inner) == 1 and isinstance(inner[0], list):
                depth, inner = depth + 1, inner[0]
            return "[" * depth + _toml_value(inner) + "]" * depth
        case list():
            return f"[{', '.join(map(_toml_value, value))}]"
        case str():
            return _toml_text(value)
        case bool() | None:
            return "true" if value else "false"
        case _:
            return repr(value)


def _toml_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _overrides(odd: OddValues) -> list[str]:
    keys = ("train.seed", "promote.location", "services", "a.b.c", "", ".", odd.text())
    return [
        f"{odd.one_of(keys)}{odd.one_of(('=', '=', '', '=='))}{odd.text(may_be_broken=True)}"
        for _ in range(odd.coin.randint(1, 3))
    ]


def _read_overrides(pairs: list[str]) -> str:
    path = _ROOT / "router_training" / "configs" / "tiny.toml"
    try:
        read_config(path, parsed_overrides(pairs))
    except ConfigInvalid as error:
        for line in str(error).splitlines():
            legible(line)
        return type(error).__name__
    return ACCEPTED


# The command line

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
