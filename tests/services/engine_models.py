"""Small models for the engine tests: random ones, and ones that write what they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

END = "<|end|>"
START = "<|start|>"
FAMILIES = ("llama", "qwen2", "mistral")
VOCABULARY_SIZE = 272  # 256 bytes, two special tokens, and room for a test's own


def byte_tokenizer(
    added: Sequence[str] = ("\n\n",), *, adds_start: bool = False, **options: Any
) -> PreTrainedTokenizerFast:
    """Builds a tokenizer of one token per byte, and one for each of the `added` texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, START: 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([END, START])
    core.add_tokens([AddedToken(text, normalized=False) for text in added])
    start = START if adds_start else None
    return wrap_tokenizer(core, eos_token=END, bos_token=start, add_bos_token=adds_start, **options)


def wrap_tokenizer(core: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """Returns the tokenizer as transformers knows it."""
    untyped: Any = PreTrainedTokenizerFast
    tokenizer = untyped(tokenizer_object=core, clean_up_tokenization_spaces=False, **options)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def random_model(family: str = "llama", *, seed: int = 0, context: int = 4096) -> PreTrainedModel:
    """Builds a model of random weights large enough that its tokens vary."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.4,
        "eos_token_id": 0,
        "bos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    match family:
        case "llama":
            return _frozen(LlamaForCausalLM(LlamaConfig(**sizes)))
        case "qwen2":
            return _frozen(Qwen2ForCausalLM(Qwen2Config(**sizes)))
        case "mistral":
            return _frozen(MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)))
        case _:
            raise ValueError(family)


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    model.train(False)
    return model


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None
) -> str:
    """Writes a model folder and returns it as a reference."""
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return str(folder)


def random_classifier(kind: str, label_count: int, *, context: int = 4096) -> PreTrainedModel:
    """Builds a classifier of `kind` "token" or "sequence" with random weights."""
    config = random_model(context=context).config
    config.num_labels = label_count
    torch.manual_seed(1)
    auto: Any = (
        AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification
    )
    model = auto.from_config(config)
    with torch.no_grad():
        # A fresh head's bias is zero and its weights small: scores would all be close to a half.
        for parameter in model.score.parameters():
            parameter.normal_(0.0, 0.4)
    return _frozen(model)


def reciter(
    tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int], *, ends: bool = True
) -> PreTrainedModel:
    """Builds a Llama that writes `token_ids` one after the other, once it reads the first.

    Embeddings are one-hot, layers add nothing, and the head maps each token to its successor; so
    no token may have two successors. Past the last, it ends, or else starts over.
    """
    successors: dict[int, int] = {}
    for token_id, next_id in pairwise(token_ids):
        assert successors.setdefault(token_id, next_id) == next_id, (token_id, next_id)
    successors.setdefault(token_ids[-1], tokenizer.eos_token_id if ends else token_ids[0])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=VOCABULARY_SIZE,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=4096,
            eos_token_id=0,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY_SIZE))
        model.lm_head.weight.zero_()
        for token_id, next_id in successors.items():
            model.lm_head.weight[next_id, token_id] = 1.0
    return _frozen(model)


async def until(holds: Callable[[], bool]) -> None:
    """Waits until the model's thread has come so far."""
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - the thread that makes it true knows no event
            await asyncio.sleep(0.001)


def random_encoder(labels: int = 2, *, context: int = 512, seed: int = 0) -> PreTrainedModel:
    """Builds a RoBERTa classifier of random weights, which reads both ways."""
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context + 1,  # the first is padding's
        type_vocab_size=1,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=0,
    )
    config.num_labels = labels
    return _frozen(RobertaForSequenceClassification(config))
