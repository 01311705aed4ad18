"""The families of process reward models: how a checkpoint tells its own, and where its head is.

A head that is read in another place, or by another rule, gives plausible nonsense; so a family is
told from what the checkpoint says and holds, or named, and what does not fit is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from torch import Tensor, nn

from arbitrage.core.shown import one_line
from services.engines.loading import LoadedModel, ModelKind, ModelLoadError
from services.engines.prm_readings import (
    PrmReading,
    PrmTokenizer,
    math_shepherd_labels,
    math_shepherd_reading,
    qwen_math_reading,
    skywork_reading,
    trl_reading,
)
from services.engines.router_format import TRL_FAMILY

SKYWORK: Final = "skywork-o1-open-prm"
QWEN_MATH: Final = "qwen2.5-math-prm"
MATH_SHEPHERD: Final = "math-shepherd"
_VALUE_HEAD: Final = "v_head.summary"
_OTHER_HEADS: Final = ("score.", "v_head.")


@dataclass(frozen=True, slots=True)
class PrmHead:
    """Maps hidden states [rows, width] to logits [rows, logit_count]."""

    logits: Callable[[Tensor], Tensor]
    logit_count: int


@dataclass(frozen=True, slots=True)
class PrmFamily:
    """One family: the class of transformers its weights are loaded as, and what is made of them.

    `read` takes a tokenizer alone; `head` finds the head in a checkpoint.
    """

    name: str
    kind: ModelKind
    read: Callable[[PrmTokenizer], PrmReading]
    head: Callable[[LoadedModel], PrmHead]

    def fit(self, loaded: LoadedModel) -> tuple[PrmReading, PrmHead]:
        """Returns how a loaded model is read, and its head.

        Raises:
            ModelLoadError: it is not of this family.
        """
        reading, head = self.read(_tokenizer_of(loaded)), self.head(loaded)
        if head.logit_count != reading.logit_count:
            raise ModelLoadError(
                loaded.reference,
                f"the head gives {head.logit_count} logits, but its family's gives "
                f"{reading.logit_count}",
                "use a checkpoint of that family, or name another ARBITRAGE_PRM_FAMILY",
            )
        return reading, head


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


def _tokenizer_of(loaded: LoadedModel) -> PrmTokenizer:
    return PrmTokenizer(loaded.reference, loaded.tokenizer, loaded.chat_tokenizer, loaded.folder)


def _trl_head(loaded: LoadedModel) -> PrmHead:
    return PrmHead(loaded.head, loaded.logit_count)


def _skywork_head(loaded: LoadedModel) -> PrmHead:
    head = _linear(loaded, _VALUE_HEAD)
    return PrmHead(head, head.out_features)


def _qwen_math_head(loaded: LoadedModel) -> PrmHead:
    first = _linear(loaded, "score.0")
    last = _linear(loaded, "score.2", reads=first.out_features)
    return PrmHead(nn.Sequential(first, nn.ReLU(), last), last.out_features)


def _math_shepherd_head(loaded: LoadedModel) -> PrmHead:
    weights = _tensors(loaded.folder)
    # Any language model has its head; what has another beside it is of another family.
    if others := sorted(name for name in weights if name.startswith(_OTHER_HEADS)):
        raise ModelLoadError(
            loaded.reference,
            f"the checkpoint has {others[0]}, the head of another family than {MATH_SHEPHERD}",
            "use a checkpoint of that family, or name another ARBITRAGE_PRM_FAMILY",
        )
    name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    rows = math_shepherd_labels(_tokenizer_of(loaded))
    head = nn.Linear(1, len(rows), bias=False)
    head.weight = _parameter(loaded, weights, name, rows)
    return PrmHead(head, len(rows))


FAMILIES: Final[Mapping[str, PrmFamily]] = {
    family.name: family
    for family in (
        PrmFamily(SKYWORK, ModelKind.BASE, skywork_reading, _skywork_head),
        PrmFamily(QWEN_MATH, ModelKind.BASE, qwen_math_reading, _qwen_math_head),
        PrmFamily(MATH_SHEPHERD, ModelKind.BASE, math_shepherd_reading, _math_shepherd_head),
        PrmFamily(TRL_FAMILY, ModelKind.TOKEN_CLASSIFICATION, trl_reading, _trl_head),
    )
}


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
