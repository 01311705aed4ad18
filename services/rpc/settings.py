"""Settings come from `ARBITRAGE_*` variables, strictly: a bad or unknown one stops the program.

Every program has one frozen settings class. Its field `max_steps` is `ARBITRAGE_MAX_STEPS`; the
field's description is what the documentation says of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from arbitrage.core.shown import one_line, shown

PREFIX = "ARBITRAGE_"

Port = Annotated[int, Field(ge=0, le=65_535)]
PositiveCount = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
CommaSeparated = Annotated[
    frozenset[str],
    BeforeValidator(
        lambda given: (
            [name.strip() for name in given.split(",") if name.strip()]
            if isinstance(given, str)
            else given
        )
    ),
]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["text", "json"]


def _checked_collector(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc or parts.path.strip("/"):
        raise PydanticCustomError("collector", "http://host:port or https://host:port")
    return url


CollectorUrl = Annotated[str, AfterValidator(_checked_collector)]


class SettingsError(Exception):
    """Settings cannot be used; `problems` has one line for each variable at fault."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class ServerSettings(BaseModel):
    """What every program that serves can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: Port = Field(description="Port of the gRPC server; 0 takes a free one.")
    metrics_port: Port = Field(9464, description="Port of /metrics; 0 takes a free one.")
    ready_file: Path | None = Field(
        None, description="File that gets address, metrics port and pid as JSON once serving."
    )
    shutdown_grace_s: Seconds = Field(
        30.0, description="Time running calls get to end after SIGTERM, in seconds."
    )
    write_timeout_s: Seconds = Field(
        30.0,
        description="Time a caller may take to read one message, or to send one over HTTP, "
        "in seconds.",
    )
    max_message_mib: int = Field(
        16, ge=1, le=1024, description="Largest message taken or sent, in MiB."
    )
    tls_certificate: Path | None = Field(
        None, description="PEM file with the server's certificate; without it, plaintext."
    )
    tls_key: Path | None = Field(None, description="PEM file with its private key.")
    tls_client_ca: Path | None = Field(
        None, description="PEM file with the CA that every caller must have a certificate of."
    )
    allowed_callers: CommaSeparated = Field(
        frozenset(),
        description="DNS names and URIs, with commas between them, of which a caller's "
        "certificate must have one; by default any will do.",
    )
    log_level: LogLevel = Field("INFO", description="Least severe log lines that are written.")
    log_format: LogFormat = Field(
        "text", description="How log lines look: text, or json with one object a line."
    )
    tracing_endpoint: CollectorUrl | None = Field(
        None,
        description="OpenTelemetry collector that gets traces over OTLP gRPC, as "
        "http://host:4317, or https:// for TLS; by default there are none.",
    )
    tracing_sample_rate: float = Field(
        1.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of traces that are sent, of those that no caller has begun.",
    )
    model_packs: str | None = Field(
        None, description="Folders with model packs, searched before the shipped ones."
    )
    model_files: str | None = Field(
        None,
        description="Folder with the files of packs that were pulled; by default "
        "~/.local/share/arbitrage/models.",
    )

    @property
    def deployment(self) -> str | None:
        """What this one is called where a program is deployed more than once."""
        return None

    @property
    def connection_age_s(self) -> float | None:
        """Time after which a caller connects anew, in seconds; None is never."""
        return None

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        check_pair(self, "tls")
        check_needs(self, "tls_client_ca", "tls_certificate")
        check_needs(self, "allowed_callers", "tls_client_ca")
        return self


def check_needs(settings: BaseModel, given: str, needed: str) -> None:
    """Checks that a setting that is given has the other one that it needs.

    Raises:
        ValueError: naming both variables.
    """
    if getattr(settings, given) and getattr(settings, needed) is None:
        raise ValueError(
            f"{variable_of(needed)}: is not set, but {variable_of(given)} is; set it too"
        )


def check_pair(settings: BaseModel, prefix: str) -> None:
    """Checks that a certificate has its key, and a key its certificate.

    Raises:
        ValueError: naming both variables.
    """
    certificate, key = f"{prefix}_certificate", f"{prefix}_key"
    check_needs(settings, certificate, key)
    check_needs(settings, key, certificate)


SettingsT = TypeVar("SettingsT", bound=ServerSettings)


def read_settings(kind: type[SettingsT], environ: Mapping[str, str]) -> SettingsT:
    """Returns the settings that the `ARBITRAGE_*` variables in `environ` make.

    Raises:
        SettingsError: naming each variable that is missing, unknown or has a bad value.
    """
    fields = {variable_of(field): field for field in kind.model_fields}
    given = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    problems = [_unknown(name, tuple(fields)) for name in given if name not in fields]
    try:
        settings = kind.model_validate(
            {fields[name]: value for name, value in given.items() if name in fields}
        )
    except ValidationError as error:
        problems += [_sentence(problem) for problem in error.errors(include_url=False)]
    if problems:
        raise SettingsError(tuple(problems))
    return settings


def variable_of(field: str) -> str:
    """Returns the variable that sets a field.

    >>> variable_of("max_steps")
    'ARBITRAGE_MAX_STEPS'
    """
    return PREFIX + field.upper()


def _unknown(variable: str, known: Sequence[str]) -> str:
    name = one_line(variable)
    nearest = get_close_matches(name.upper(), known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
    return f"{name}: no such setting; {hint}"


def _sentence(problem: Any) -> str:
    if not problem["loc"]:
        # A check that concerns several variables; its message names them.
        return str(problem["ctx"]["error"])
    variable = variable_of(str(problem["loc"][0]))
    if problem["type"] == "missing":
        return f"{variable}: is not set and has no default"
    return f"{variable}: expected {_expectation(problem)}, got {shown(problem['input'])}"


def _expectation(problem: Any) -> str:
    context = problem.get("ctx", {})
    match problem["type"]:
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return "an integer"
        case "float_parsing" | "float_type" | "finite_number":
            return "a number"
        case "bool_parsing" | "bool_type":
            return "true or false"
        case "literal_error" | "enum":
            return f"one of {context['expected']}".replace("'", "")
        case "greater_than_equal":
            return f"at least {context['ge']:g}"
        case "greater_than":
            return f"more than {context['gt']:g}"
        case "less_than_equal":
            return f"at most {context['le']:g}"
        case "string_too_short":
            return "some text"
        case _:
            return str(problem["msg"])
