"""Builds models that judge what a language model would have written: a frozen trunk, layers on top.

Two things keep a plain fine-tune of the trunk from checking a token against the trunk's own
prediction of it, and this module removes both without changing what the trunk computes:

- The trunk has forgotten which token it just read. Its residual stream grows to several hundred
  times the embedding's norm, and a linear probe reads the current digit with 48 % accuracy. So the
  stream is widened by CODE_WIDTH dimensions that carry a fixed random code of the token past the
  trunk, which neither reads nor writes them.
- New layers are not heard beside a stream of that size. Norms are blind to its scale, so everything
  that writes to it (and the norms' epsilon) is scaled down.
"""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

CODE_WIDTH: Final = 32
COMPARING_LAYER_COUNT: Final = 3
JUDGING_LAYER_COUNT: Final = 2
TOP_LAYER_COUNT: Final = COMPARING_LAYER_COUNT + JUDGING_LAYER_COUNT
_CODE_NORM: Final = 0.005  # beside an embedding of 0.13: too little to disturb the trunk's norms
_STREAM_NORM: Final = 58.0  # what the trunk's stream has grown to after its last layer


def judge_config(trunk: LlamaConfig) -> LlamaConfig:
    """Returns the configuration of a two-class judge on this trunk."""
    return LlamaConfig.from_dict(
        trunk.to_dict()
        | {
            "num_labels": 2,
            "num_hidden_layers": trunk.num_hidden_layers + TOP_LAYER_COUNT,
            "hidden_size": trunk.hidden_size + CODE_WIDTH,
            "rms_norm_eps": trunk.rms_norm_eps / _STREAM_NORM**2,
        }
    )


@torch.no_grad()
def install_trunk(model: PreTrainedModel, folder: Path) -> None:
    """Copies a trained language model into the bottom layers of a judge, computing what it did."""
    trunk: Any = LlamaForCausalLM.from_pretrained(folder).model
    width = trunk.config.hidden_size
    body: Any = model.model
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(trunk.config.vocab_size, CODE_WIDTH, generator=generator).sign()
    embedding = body.embed_tokens.weight
    embedding[:, :width] = trunk.embed_tokens.weight / _STREAM_NORM
    embedding[:, width:] = codes * _CODE_NORM / _STREAM_NORM
    share = (width / (width + CODE_WIDTH)) ** 0.5  # a norm's mean now counts the code's dimensions
    for old, new in zip(trunk.layers, body.layers, strict=False):
        for parameter in new.parameters():
            parameter.zero_()
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            new.get_submodule(name).weight[:, :width] = old.get_submodule(name).weight
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            new.get_submodule(name).weight[:, :width] = old.get_submodule(name).weight
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            new.get_submodule(name).weight[:width] = old.get_submodule(name).weight / _STREAM_NORM
        for name in ("input_layernorm", "post_attention_layernorm"):
            new.get_submodule(name).weight[:width] = old.get_submodule(name).weight * share


@torch.no_grad()
def prepare_top(model: PreTrainedModel) -> None:
    """Lets the top layers hear the codes and start by adding nothing."""
    width = model.config.hidden_size - CODE_WIDTH
    for layer in top_layers(model):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[width:] = _STREAM_NORM / _CODE_NORM
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.norm.weight[width:] = 0.0


def top_layers(model: PreTrainedModel) -> list[Any]:
    """Returns the layers above the trunk."""
    return list(model.model.layers[-TOP_LAYER_COUNT:])


def leave_to_learn(model: PreTrainedModel, first: int, last: int) -> None:
    """Lets only the layers from `first` up to, not with, `last` learn, and the norm and head."""
    model.requires_grad_(True)
    layers = model.model.layers
    for module in (model.model.embed_tokens, *layers[:first], *layers[last:]):
        module.requires_grad_(False)


@torch.no_grad()
def keep_codes(model: PreTrainedModel) -> None:
    """Undoes what a training step wrote over the codes' dimensions."""
    width = model.config.hidden_size - CODE_WIDTH
    for layer in top_layers(model):
        layer.self_attn.o_proj.weight[width:] = 0.0
        layer.mlp.down_proj.weight[width:] = 0.0
    model.model.norm.weight[width:] = 0.0


@torch.no_grad()
def frozen_output(model: PreTrainedModel, ids: Tensor, first: int) -> Tensor:
    """Returns what layer `first` reads, [rows, tokens, width]; training computes it only once."""
    hidden: Tensor = model.model.embed_tokens(ids)
    position = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for layer in model.model.layers[:first]:
        hidden = layer(hidden, position_embeddings=position)
    return hidden


def rest_output(model: PreTrainedModel, hidden: Tensor, first: int) -> Tensor:
    """Returns the last hidden state [rows, tokens, width] from what layer `first` reads."""
    position = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for layer in model.model.layers[first:]:
        hidden = layer(hidden, position_embeddings=position)
    result: Tensor = model.model.norm(hidden)
    return result
