"""The families of process reward models: how each reads a step, and where it keeps its head.

A head that is read in another place, or by another rule, gives plausible nonsense; so a family is
told from what the checkpoint says and holds, or named, and what does not fit is refused.

Sources: the model cards and code of Skywork-o1-Open-PRM, Qwen2.5-Math-PRM and Math-Shepherd, and
TRL's PRM trainer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from safetensors import safe_open
from torch import Tensor, nn

from arbitrage.core.shown import one_line
from services.engines.loading import LoadedModel, ModelKind, ModelLoadError
from services.engines.prm_layouts import ClosedSteps, MarkedText, PrmLayout
from services.engines.router_format import (
    TRL_FAMILY,
    FormatError,
    PrmFormat,
    SoftmaxRule,
    read_prm_format,
)

SKYWORK: Final = "skywork-o1-open-prm"
QWEN_MATH: Final = "qwen2.5-math-prm"
MATH_SHEPHERD: Final = "math-shepherd"
_VALUE_HEAD: Final = "v_head.summary"
_QWEN_SYSTEM: Final = "Please reason step by step, and put your final answer within \\boxed{}."
_QWEN_MARK: Final = "<extra_0>"
_SHEPHERD_MARK: Final = " ки"
_SHEPHERD_LABELS: Final = ("+", "-")


class StepRule(Protocol):
    """Turns the logits at a step into its score."""

    def score(self, logits: Sequence[float]) -> float:
        """Returns the reward in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class SigmoidRule:
    """One value, whose sigmoid is the score."""

    def score(self, logits: Sequence[float]) -> float:
        """Returns the reward in [0, 1]."""
        value = logits[0]
        return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


@dataclass(frozen=True, slots=True)
class PrmParts:
    """What a family makes of a checkpoint: `head` maps hidden states [rows, width] to logits."""

    layout: PrmLayout
    head: Callable[[Tensor], Tensor]
    rule: StepRule


@dataclass(frozen=True, slots=True)
class PrmFamily:
    """One family: the class of transformers its weights are loaded as, and what is made of them."""

    name: str
    kind: ModelKind
    fit: Callable[[LoadedModel], PrmParts]


def find_family(folder: Path, reference: str, named: str | None = None) -> PrmFamily:
    """Returns the family that `named` names, or that the checkpoint in `folder` is of.

    Raises:
        ModelLoadError: nothing tells it.
    """
    if named is not None:
        return FAMILIES[named]
    config = _config(folder, reference)
    names = " ".join(config.get("architectures") or ())
    keys = _tensor_names(folder)
    if f"{_VALUE_HEAD}.weight" in keys:
        return FAMILIES[SKYWORK]
    if "score.0.weight" in keys or "ProcessRewardModel" in names:
        return FAMILIES[QWEN_MATH]
    if "ForTokenClassification" in names or (folder / "prm.json").exists():
        return FAMILIES[TRL_FAMILY]
    if "shepherd" in reference.lower() or "shepherd" in str(config.get("_name_or_path")).lower():
        return FAMILIES[MATH_SHEPHERD]
    raise ModelLoadError(
        reference,
        f"config.json ({one_line(names, 100) or 'no architectures'}) and weights are of no known "
        "family of PRMs",
        f"set ARBITRAGE_PRM_FAMILY to one of {', '.join(FAMILIES)}",
    )


def _fit_trl(loaded: LoadedModel) -> PrmParts:
    path = loaded.folder / "prm.json"
    try:
        known = read_prm_format(path) if path.exists() else PrmFormat()
    except FormatError as error:
        raise ModelLoadError(loaded.reference, f"prm.json: {error}", "correct prm.json") from error
    _check_width(loaded, loaded.logit_count, 2, "token classifier")
    layout = ClosedSteps(
        loaded.tokenizer,
        # TRL puts a bos before the problem wherever the tokenizer has one.
        start_ids=() if loaded.bos_id is None else (loaded.bos_id,),
        close_ids=separator_ids(loaded, known.separator),
        head=lambda problem: problem + known.prompt_suffix,
    )
    return PrmParts(layout, loaded.head, SoftmaxRule(known.positive_label))


def _fit_skywork(loaded: LoadedModel) -> PrmParts:
    head = _linear(loaded, _VALUE_HEAD)
    _check_width(loaded, head.out_features, 1, "value head")
    layout = ClosedSteps(
        loaded.tokenizer,
        start_ids=() if loaded.bos_id is None else (loaded.bos_id,),
        close_ids=separator_ids(loaded, "\n")[-1:],
        head=lambda problem: f"{problem}\n",
    )
    return PrmParts(layout, head, SigmoidRule())


def _fit_qwen_math(loaded: LoadedModel) -> PrmParts:
    first = _linear(loaded, "score.0")
    last = _linear(loaded, "score.2", reads=first.out_features)
    head = nn.Sequential(first, nn.ReLU(), last)
    _check_width(loaded, last.out_features, 2, "classifier")
    mark = _one_id(loaded, _QWEN_MARK)
    layout = ClosedSteps(
        loaded.tokenizer,
        start_ids=(),
        close_ids=(mark,),
        head=_qwen_head(loaded),
        opens_in_head=True,
    )
    return PrmParts(layout, head, SoftmaxRule(1))


def _qwen_head(loaded: LoadedModel) -> Callable[[str], str]:
    tokenizer: Any = loaded.chat_tokenizer
    if not tokenizer.chat_template:
        raise ModelLoadError(
            loaded.reference, "its tokenizer has no chat template", "fetch tokenizer_config.json"
        )

    def head(problem: str) -> str:
        turns = [
            {"role": "system", "content": _QWEN_SYSTEM},
            {"role": "user", "content": problem},
        ]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    return head


def _fit_math_shepherd(loaded: LoadedModel) -> PrmParts:
    weights = _tensors(loaded.folder)
    name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    rows = [_one_id(loaded, f" {label}") for label in _SHEPHERD_LABELS]
    # A whole step ends in the mark's last token.
    separator_ids(loaded, _SHEPHERD_MARK)
    head = nn.Linear(1, len(rows), bias=False)
    head.weight = _parameter(loaded, weights, name, rows)
    return PrmParts(MarkedText(loaded.tokenizer, _SHEPHERD_MARK), head, SoftmaxRule(0))


FAMILIES: Final[Mapping[str, PrmFamily]] = {
    family.name: family
    for family in (
        PrmFamily(SKYWORK, ModelKind.BASE, _fit_skywork),
        PrmFamily(QWEN_MATH, ModelKind.BASE, _fit_qwen_math),
        PrmFamily(MATH_SHEPHERD, ModelKind.BASE, _fit_math_shepherd),
        PrmFamily(TRL_FAMILY, ModelKind.TOKEN_CLASSIFICATION, _fit_trl),
    )
}


def separator_ids(loaded: LoadedModel, separator: str) -> tuple[int, ...]:
    """Returns the ids of the text that ends a step.

    Raises:
        ModelLoadError: there are none.
    """
    ids = loaded.tokenizer.encode(separator)
    if not ids:
        raise ModelLoadError(
            loaded.reference,
            f"its tokenizer turns the separator {separator!r} into no token, so no step has a "
            "place to be judged at",
            "use a tokenizer that keeps newlines",
        )
    return ids


def _one_id(loaded: LoadedModel, text: str) -> int:
    ids = loaded.tokenizer.encode(text)
    # Tokenizers of the Llama kind put a space of their own before it, at times as a token.
    if len(ids) > 1:
        ids = loaded.tokenizer.encode(text.strip())
    if len(ids) != 1:
        raise ModelLoadError(
            loaded.reference,
            f"its tokenizer has no single token for {text.strip()!r}, which its family reads",
            "use the checkpoint's own tokenizer, or name another ARBITRAGE_PRM_FAMILY",
        )
    return ids[0]


def _check_width(loaded: LoadedModel, found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ModelLoadError(
            loaded.reference,
            f"the head gives {found} logits, but its family's {what} gives {expected}",
            "use a checkpoint of that family, or name another ARBITRAGE_PRM_FAMILY",
        )


def _linear(loaded: LoadedModel, name: str, reads: int | None = None) -> nn.Linear:
    """Returns a layer of the checkpoint that transformers does not know.

    It reads `reads` values, by default the model's hidden states.

    Raises:
        ModelLoadError: it is not there, or of no width that fits.
    """
    weights = _tensors(loaded.folder)
    layer = nn.Linear(1, 1, bias=f"{name}.bias" in weights)
    layer.weight = _parameter(loaded, weights, f"{name}.weight")
    layer.out_features, layer.in_features = layer.weight.shape
    if layer.bias is not None:
        layer.bias = _parameter(loaded, weights, f"{name}.bias")
    width = reads or loaded.packed.model.config.hidden_size
    if layer.in_features != width:
        raise ModelLoadError(
            loaded.reference,
            f"{name}.weight reads {layer.in_features} values, but is given {width}",
            "fetch the model again",
        )
    return layer


def _parameter(
    loaded: LoadedModel,
    weights: Mapping[str, Path],
    name: str,
    rows: Sequence[int] | None = None,
) -> nn.Parameter:
    if name not in weights:
        raise ModelLoadError(
            loaded.reference,
            f"the checkpoint has no {name}, where its family keeps its head",
            "use a checkpoint of that family, or name another ARBITRAGE_PRM_FAMILY",
        )
    shape = loaded.packed.kv_shape
    with safe_open(weights[name], "pt") as stream:
        tensor = stream.get_tensor(name)
    if rows is not None:
        tensor = tensor[list(rows)]
    return nn.Parameter(tensor.to(shape.device, shape.dtype), requires_grad=False)


def _tensors(folder: Path) -> Mapping[str, Path]:
    """Returns the file of each tensor."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stream:
            found.update(dict.fromkeys(stream.keys(), path))
    return found


def _tensor_names(folder: Path) -> frozenset[str]:
    return frozenset(_tensors(folder))


def _config(folder: Path, reference: str) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            reference, f"config.json cannot be read ({error})", "fetch the model again"
        ) from error
    return config if isinstance(config, dict) else {}
