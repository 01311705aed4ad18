"""A packed forward computes what the stock model computes, for each sequence alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from services.engines.packed import Chunk, PackedModel, SequenceKv, UnsupportedModel
from tests.services.engine_models import FAMILIES, VOCABULARY_SIZE, random_model


def _tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY_SIZE, (count,), generator=generator).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_forward_equals_the_stock_model(family: str) -> None:
    stock = random_model(family)
    packed = PackedModel(random_model(family))
    prompts = [_tokens(count, seed) for seed, count in enumerate((1, 7, 150, 33))]
    # The sizes of the chunks in which each prompt goes in; decoding is a chunk of one.
    sizes = [(1,), (3, 4), (64, 1, 85), (31, 1, 1)]
    kvs = [SequenceKv(packed.kv_shape, len(prompt)) for prompt in prompts]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]

    for turn in range(3):
        members = [i for i in range(len(prompts)) if turn < len(sizes[i])]
        chunks = []
        for i in members:
            start = kvs[i].token_count
            chunks.append(Chunk(kvs[i], prompts[i][start : start + sizes[i][turn]]))
        hidden = packed.forward(chunks)
        parts = packed.model.lm_head(hidden).split([len(chunk.token_ids) for chunk in chunks])
        for i, part in zip(members, parts, strict=True):
            logits[i].append(part)

    for prompt, parts_of_one in zip(prompts, logits, strict=True):
        with torch.inference_mode():
            expected = stock(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(torch.cat(parts_of_one), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_the_stock_model_with_its_own_cache(family: str) -> None:
    stock = random_model(family)
    packed = PackedModel(random_model(family))
    prompt = _tokens(20, 0)
    kv = SequenceKv(packed.kv_shape, 400)
    token_ids = prompt
    written = []
    for _ in range(100):
        row = packed.forward([Chunk(kv, token_ids)])[-1:]
        token_ids = [int(packed.model.lm_head(row).argmax())]
        written += token_ids

    expected = cast("Any", stock).generate(
        torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=None
    )

    assert written == expected[0, len(prompt) :].tolist()


def test_verify_accepts_a_supported_model() -> None:
    for family in FAMILIES:
        PackedModel(random_model(family)).verify()


def test_verify_refuses_a_model_whose_attention_goes_its_own_way() -> None:
    model = random_model()
    # This layer keeps its own config, so the registered attention never reaches it.
    layer = cast("Any", model.base_model).layers[1]
    layer.self_attn.config = deepcopy(model.config)

    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM"):
        PackedModel(model).verify()


def test_a_sliding_window_bounds_the_context() -> None:
    config = MistralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = PackedModel(MistralForCausalLM(config))
    # Within the window it is the attention that a packed forward computes.
    model.verify()
    assert model.max_context_tokens == 8


def test_softcaps_and_mixed_layers_are_refused() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    with pytest.raises(UnsupportedModel, match="sliding_attention"):
        PackedModel(Gemma2ForCausalLM(Gemma2Config(**sizes)))
    only_full = Gemma2Config(**sizes, layer_types=["full_attention"] * 2, sliding_window=None)
    with pytest.raises(UnsupportedModel, match="softcapped"):
        PackedModel(Gemma2ForCausalLM(only_full))


def test_a_failed_forward_leaves_every_sequence_as_it_was() -> None:
    packed = PackedModel(random_model())
    kv = SequenceKv(packed.kv_shape, 16)
    packed.forward([Chunk(kv, [1, 2, 3])])

    with pytest.raises(IndexError):
        packed.forward([Chunk(kv, [VOCABULARY_SIZE + 5])])
    after = packed.forward([Chunk(kv, [4])])

    fresh = SequenceKv(packed.kv_shape, 16)
    expected = packed.forward([Chunk(fresh, [1, 2, 3, 4])])[-1:]
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


def test_buffers_double_and_stop_at_the_limit() -> None:
    kv = SequenceKv(PackedModel(random_model()).kv_shape, 300)
    capacities = []
    for token_count in range(1, 301):
        kv.reserve(token_count)
        capacities.append(kv.capacity_tokens)

    assert sorted(set(capacities)) == [64, 128, 256, 300]


def test_a_copied_prefix_goes_on_as_the_original_does() -> None:
    packed = PackedModel(random_model())
    original = SequenceKv(packed.kv_shape, 100)
    packed.forward([Chunk(original, _tokens(90, 1))])
    copy = original.copy_prefix(70, 100)

    ours = packed.forward([Chunk(copy, [5, 6])])

    fresh = SequenceKv(packed.kv_shape, 100)
    expected = packed.forward([Chunk(fresh, [*_tokens(90, 1)[:70], 5, 6])])[-2:]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (original.token_count, copy.token_count) == (90, 72)
