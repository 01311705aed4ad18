"""The configuration of a run, read strictly from TOML: a key nobody knows stops the program."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arbitrage.core.shown import one_line, shown
from router_training.errors import ConfigInvalid

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
# What a row, and every library that takes a seed, can hold.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
PrefixPolicyName = Literal["oracle", "random", "router"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Services(_Section):
    """Where the models are: a pack whose services are started for the run, or addresses.

    `device` is torch's name of where a pack's models run. With `tls_ca`, the PEM file of a CA,
    services are reached over TLS, and shown `tls_certificate` where they want one.
    """

    pack: str | None = None
    draft: str | None = None
    target: str | None = None
    prm: str | None = None
    router: str | None = None
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    device: str = "cpu"
    call_timeout_s: Annotated[float, Field(gt=0)] = 120.0

    @model_validator(mode="after")
    def _either_a_pack_or_addresses(self) -> Self:
        addresses = (self.draft, self.target, self.prm)
        if self.pack is not None and any((*addresses, self.router)):
            raise ValueError("give either pack or addresses, not both")
        if self.pack is None and not all(addresses):
            raise ValueError("give a pack, or the addresses of draft, target and prm")
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key: give both or neither")
        if self.tls_certificate is not None and self.tls_ca is None:
            raise ValueError("tls_certificate: needs tls_ca, the CA of the services' certificates")
        if self.pack is not None and self.tls_ca is not None:
            raise ValueError("tls_ca: a pack's services are started in plaintext; leave it out")
        return self


class Questions(_Section):
    """What is walked."""

    source: str = Field(min_length=1)
    split: str = "train"
    revision: str | None = None
    problem_column: str = "problem"
    stratify_by: str | None = None
    count: Count | None = None
    seed: Seed = 0


class Collect(_Section):
    """How the questions are walked.

    `prefix_policies` are weights: each question is walked under one of them. `target_samples`
    steps of the target are drawn per prefix at `target_temperature`; 0 is greedy.
    """

    prefix_policies: dict[PrefixPolicyName, Annotated[float, Field(ge=0)]] = {"oracle": 1.0}
    random_rate: Share = 0.5
    target_samples: Count = 1
    target_temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    entropy_token_count: Count = 4
    max_steps: Count = 32
    max_step_tokens: Count = 256
    concurrency: Count = 8
    questions_per_part: Count = 128
    seed: Seed = 0

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.target_samples > 1 and self.target_temperature == 0.0:
            raise ValueError(
                "target_samples: several samples need target_temperature above 0, or all are equal"
            )
        if not sum(self.prefix_policies.values()):
            raise ValueError("prefix_policies: give at least one policy a weight above 0")
        return self


class Label(_Section):
    """How advantages become labels and questions are split.

    An advantage counts as positive above `margin`. Rows whose question falls into
    `validation_share` select the checkpoint, those in `test_share` are only evaluated.
    """

    kind: Literal["softmax", "quantile", "ordinal"] = "softmax"
    class_count: Annotated[int, Field(ge=2, le=64)] = 2
    margin: Share = 0.0
    balanced: bool = True
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    seed: Seed = 0

    @model_validator(mode="after")
    def _classes_fit_the_kind(self) -> Self:
        if self.kind == "softmax" and self.class_count != 2:
            raise ValueError("class_count: kind softmax has 2 classes; take kind quantile for more")
        if self.kind != "softmax" and self.class_count % 2:
            raise ValueError(
                "class_count: half of the classes lie on either side; give an even one"
            )
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share: leave something to train on")
        return self


class Lora(_Section):
    """Low-rank adapters instead of whole matrices; merged into the weights in the end."""

    rank: Count = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"


class Train(_Section):
    """How the router is trained. `init` is a PRM checkpoint, a router, a causal LM, or an encoder.

    `batch_rows` is each process's: under `torchrun` an optimiser step takes as many from each.
    """

    init: str = Field(min_length=1)
    annotated: bool = True
    max_tokens: Count = 4096
    frozen_layers: Annotated[int, Field(ge=0)] = 0
    epochs: Annotated[float, Field(gt=0)] = 3.0
    batch_rows: Count = 32
    accumulation_steps: Count = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_share: Share = 0.05
    evaluations: Count = 8
    patience: Count = 4
    precision: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    threads: Count | None = None
    seed: Seed = 0
    lora: Lora | None = None


class Evaluate(_Section):
    """How the router is judged. `calibration_questions` are walked to tabulate target shares."""

    rounds: Annotated[int, Field(ge=100)] = 1000
    calibration_questions: Count = 300
    default_target_share: Share = 0.5
    seed: Seed = 0


class Promote(_Section):
    """Where the router service looks for its router: a folder or an `fsspec` URL."""

    location: str = Field(min_length=1)


class RunConfig(_Section):
    """One run, from questions to a router that serves. `work` keeps what the stages make."""

    work: Path
    services: Services
    questions: Questions
    collect: Collect = Collect()
    label: Label = Label()
    train: Train
    evaluate: Evaluate = Evaluate()
    promote: Promote


def read_config(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Reads a TOML file; `overrides` replaces values by dotted key, such as `train.seed`.

    Raises:
        ConfigInvalid: naming each key at fault.
    """
    try:
        fields: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(f"--config {path}: {error.strerror}; give a TOML file") from None
    except (ValueError, RecursionError) as error:  # bad UTF-8, numbers of thousands of digits
        raise ConfigInvalid(f"{path}: it is no TOML ({error}); correct it") from None
    for key, value in (overrides or {}).items():
        _override(fields, key, value)
    try:
        return RunConfig.model_validate(fields)
    except ValidationError as error:
        problems = [_sentence(problem) for problem in error.errors(include_url=False)]
        raise ConfigInvalid("\n".join(f"{path}: {problem}" for problem in problems)) from None


def parsed_overrides(pairs: list[str]) -> dict[str, Any]:
    """Returns what `--set KEY=VALUE` arguments say; values are TOML, bare words are texts.

    >>> parsed_overrides(["train.seed=3", "promote.location=build/router"])
    {'train.seed': 3, 'promote.location': 'build/router'}
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigInvalid(f"--set {shown(pair)}: expected KEY=VALUE, such as train.seed=3")
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):
            found[key] = value
    return found


def _override(fields: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = fields.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigInvalid(
                f"--set {one_line(key)}: {shown(section)} is no section; correct the key"
            )
        fields = inner
    fields[last] = value


def _sentence(problem: Any) -> str:
    key = one_line(".".join(map(str, problem["loc"]))) or "the file"
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: there is no such key; remove or correct it"
        case "missing":
            return f"{key}: it is missing; add it"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case _:
            return f"{key}: {problem['msg']}, got {shown(problem['input'])}"
