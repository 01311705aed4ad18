"""The router's model: a stock sequence classifier that starts from some checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_training.config import Lora, Train
from router_training.errors import ConfigInvalid
from services.engines.encoder import is_encoder
from services.engines.packs import resolve_model

_HUB_PARTS = 2


def initial_model(settings: Train, logit_count: int) -> PreTrainedModel:
    """Returns a classifier with the weights of `train.init` and a head of `logit_count` logits.

    A reward model of two labels lends its head too, where the router has two: what it takes for
    wrong is the first guess at what to escalate. Other heads start at random, by the seed.

    Raises:
        ConfigInvalid: nothing can be loaded, or a layer count does not fit.
    """
    source, revision = _source(settings.init)
    torch.manual_seed(settings.seed)
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            source,
            revision=revision,
            num_labels=logit_count,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigInvalid(
            f"train.init: {settings.init!r} cannot be loaded ({error}); give a folder, "
            "org/name@revision or pack/member with a config.json and safetensors"
        ) from None
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) and not is_encoder(model):
        raise ConfigInvalid(
            f"train.init: {type(model).__name__} is neither a decoder with a head on its last "
            "token (Llama, Qwen2, Mistral …) nor an encoder (ModernBERT, RoBERTa …); use one"
        )
    if isinstance(head, nn.Linear) and _is_reward_model(config) and logit_count == 2:
        positive = _positive_label(Path(source))
        with torch.no_grad():
            head.weight.copy_(head.weight[[positive, 1 - positive]])
    if model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id or 0
    _freeze(model, settings)
    adapted: PreTrainedModel = _with_lora(model, settings.lora) if settings.lora else model
    return adapted


def initial_tokenizer(settings: Train) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that lies beside `train.init`."""
    source, revision = _source(settings.init)
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            source, revision=revision
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigInvalid(
            f"train.init: no tokenizer beside {settings.init!r} ({error})"
        ) from None
    return tokenizer


def merged(model: Any) -> PreTrainedModel:
    """Returns the stock model, adapters folded into its weights."""
    result: PreTrainedModel = model.merge_and_unload() if hasattr(model, "peft_config") else model
    return result


def _source(reference: str) -> tuple[str, str | None]:
    if Path(reference).is_dir():
        return reference, None
    if (folder := resolve_model(reference)) is not None:
        return str(folder), None
    name, _, revision = reference.partition("@")
    if name.count("/") != _HUB_PARTS - 1 or not revision:
        raise ConfigInvalid(
            f"train.init: {reference!r} is no folder; give a folder, pack/member, or a Hugging "
            "Face id as org/name@revision"
        )
    return name, revision


def _is_reward_model(config: Any) -> bool:
    return any("ForTokenClassification" in name for name in config.architectures or ())


def _positive_label(folder: Path) -> int:
    path = folder / "prm.json"
    return int(json.loads(path.read_text())["positive_label"]) if path.is_file() else 1


def _freeze(model: Any, settings: Train) -> None:
    if not settings.frozen_layers:
        return
    layers = getattr(model.base_model, "layers", ())
    if settings.frozen_layers > len(layers):
        raise ConfigInvalid(
            f"train.frozen_layers: {settings.frozen_layers} asked for, but {settings.init!r} has "
            f"{len(layers)} layers; lower it"
        )
    for module in (model.get_input_embeddings(), *layers[: settings.frozen_layers]):
        module.requires_grad_(False)


def _with_lora(model: PreTrainedModel, lora: Lora) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            modules_to_save=["score"],
        ),
    )
