"""Runs new tokens of many sequences through a stock transformers model in one forward.

The tokens lie end to end in a single row: nothing is padded and no mask spans two sequences. Each
sequence keeps its own keys and values, and attention runs per sequence over those alone. So what
a sequence computes never depends on its neighbours, and prefill and decoding mix freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "arbitrage_packed"
_FIRST_CAPACITY = 64
# Rotations that depend on a token's own position alone. The others look at the longest position in
# the row, which is a neighbour's.
_STATIC_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}


class UnsupportedModel(ValueError):
    """The model's attention is not the plain causal kind that a packed forward computes."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """Sizes of the keys and values of one token."""

    layer_count: int
    head_count: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take over all layers."""
        return 2 * self.layer_count * self.head_count * self.head_dim * self.dtype.itemsize


class SequenceKv:
    """Keys and values of one sequence's tokens, in buffers that double until `limit_tokens`."""

    __slots__ = ("_shape", "_storage", "limit_tokens", "token_count")

    def __init__(self, shape: KvShape, limit_tokens: int) -> None:
        self._shape = shape
        self.limit_tokens = limit_tokens
        self.token_count = 0
        self._allocate(min(_FIRST_CAPACITY, limit_tokens))

    @property
    def capacity_tokens(self) -> int:
        """Tokens the buffers hold room for."""
        return self._storage.shape[-2]

    def _allocate(self, capacity: int) -> None:
        shape = self._shape
        # One block for all layers: growing and copying a prefix are one operation each.
        self._storage = torch.empty(
            (2 * shape.layer_count, 1, shape.head_count, capacity, shape.head_dim),
            dtype=shape.dtype,
            device=shape.device,
        )

    def planes(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Returns views of tokens [start, stop): each layer's keys, then its values, in turn.

        Each is [1, heads, stop - start, head_dim].
        """
        return self._storage.narrow(3, start, stop - start).unbind(0)

    def reserve(self, token_count: int) -> None:
        """Makes room for `token_count` tokens in all."""
        if token_count <= self.capacity_tokens:
            return
        assert token_count <= self.limit_tokens, (token_count, self.limit_tokens)
        known = self._storage
        self._allocate(min(max(token_count, 2 * self.capacity_tokens), self.limit_tokens))
        self._storage[..., : self.token_count, :] = known[..., : self.token_count, :]

    def truncate(self, token_count: int) -> None:
        """Forgets the tokens after the first `token_count`."""
        assert token_count <= self.token_count
        self.token_count = token_count

    def copy_prefix(self, token_count: int, limit_tokens: int) -> SequenceKv:
        """Returns a new sequence that starts with this one's first `token_count` tokens."""
        assert token_count <= self.token_count
        copy = SequenceKv(self._shape, limit_tokens)
        copy.reserve(token_count)
        copy._storage[..., :token_count, :] = self._storage[..., :token_count, :]
        copy.token_count = token_count
        return copy


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of one sequence."""

    kv: SequenceKv
    token_ids: Sequence[int]


class _Segment:
    """One chunk's place in the row, with the attention of its tokens."""

    __slots__ = ("_groups", "_known", "_mask", "_new", "_start", "length")

    def __init__(self, chunk: Chunk, groups: int, device: torch.device) -> None:
        self._groups = groups
        self.length = len(chunk.token_ids)
        self._start = chunk.kv.token_count
        stop = self._start + self.length
        # All layers' views at once: taken layer by layer they cost a tenth of a token's time.
        self._new = chunk.kv.planes(self._start, stop)
        self._known = chunk.kv.planes(0, stop)
        self._mask: Tensor | None = None
        if self.length > 1 and self._start > 0:
            # Row i sees what was there before and the chunk's tokens up to itself. Built once
            # per forward, shared by the layers; tiled because `attend` stacks head groups.
            causal = torch.ones(self.length, stop, dtype=torch.bool, device=device)
            self._mask = causal.tril(self._start).repeat(groups, 1)

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> Tensor:
        """Stores the chunk's keys and values, and returns its attention [1, length, heads, dim].

        `query` is [1, heads, length, dim]; `key` and `value` are [1, kv_heads, length, dim].
        """
        self._new[2 * layer_index].copy_(key)
        self._new[2 * layer_index + 1].copy_(value)
        if self._start == 0 and self.length > 1:
            out = scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=self._groups > 1
            )
            return out.transpose(1, 2)
        # Heads that share keys are stacked as further query rows: attention then reads the keys
        # once per group instead of expanding them, whatever kernel runs.
        heads, dim = query.shape[1], query.shape[3]
        out = scaled_dot_product_attention(
            query.reshape(1, heads // self._groups, self._groups * self.length, dim),
            self._known[2 * layer_index],
            self._known[2 * layer_index + 1],
            attn_mask=self._mask,
            scale=scaling,
        )
        if self.length == 1:
            return out.reshape(1, 1, heads, dim)
        return out.reshape(1, heads, self.length, dim).transpose(1, 2)


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    segments: Sequence[_Segment],
    **_unused: Any,
) -> tuple[Tensor, None]:
    layer = cast("int", module.layer_idx)
    if len(segments) == 1:
        return segments[0].attend(layer, query, key, value, scaling), None
    lengths = [segment.length for segment in segments]
    parts = zip(
        segments,
        query.split_with_sizes(lengths, 2),
        key.split_with_sizes(lengths, 2),
        value.split_with_sizes(lengths, 2),
        strict=True,
    )
    return torch.cat([s.attend(layer, q, k, v, scaling) for s, q, k, v in parts], dim=1), None


class PackedModel:
    """A stock decoder whose forward takes the next tokens of any number of sequences."""

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_unsupported(model)
        # Registered as attention but not as a mask: transformers then builds no mask at all.
        AttentionInterface.register(ATTENTION, _packed_attention)
        model.set_attn_implementation(ATTENTION)
        self.model = model.train(False)
        self._backbone = model.base_model
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self._groups = heads // kv_heads
        weight = next(model.parameters())
        self.kv_shape = KvShape(
            layer_count=config.num_hidden_layers,
            head_count=kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=weight.dtype,
            device=weight.device,
        )
        # Within a window, attention over it is attention over all. Qwen2 writes one into configs
        # that do not use it; the loaded value tells.
        window = getattr(config, "sliding_window", None)
        self.max_context_tokens: int = min(
            config.max_position_embeddings, window or config.max_position_embeddings
        )

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Returns the last hidden states [tokens, width] of all chunks' tokens, in order.

        Afterwards each sequence has its chunk's tokens in its keys and values. If this raises,
        every sequence is as it was.
        """
        device = self.kv_shape.device
        token_ids: list[int] = []
        positions: list[int] = []
        segments: list[_Segment] = []
        for chunk in chunks:
            start, stop = chunk.kv.token_count, chunk.kv.token_count + len(chunk.token_ids)
            chunk.kv.reserve(stop)
            token_ids.extend(chunk.token_ids)
            positions.extend(range(start, stop))
            segments.append(_Segment(chunk, self._groups, device))
        row = torch.tensor((token_ids, positions), device=device)  # one transfer for both
        hidden = self._backbone(
            input_ids=row[:1], position_ids=row[1:], use_cache=False, segments=segments
        ).last_hidden_state
        for chunk in chunks:
            chunk.kv.token_count += len(chunk.token_ids)
        return cast("Tensor", hidden[0])

    @torch.inference_mode()
    def verify(self) -> None:
        """Raises `UnsupportedModel` if a packed forward differs from the model's own.

        One tiny comparison at start-up: an architecture that ignores the registered attention,
        or that does more in it than this module knows, is refused instead of served wrongly.
        """
        token_ids = list(range(8))
        self.model.set_attn_implementation("sdpa")
        row = torch.tensor([token_ids], device=self.kv_shape.device)
        expected = self._backbone(input_ids=row, use_cache=False).last_hidden_state[0]
        self.model.set_attn_implementation(ATTENTION)
        first, second = (SequenceKv(self.kv_shape, len(token_ids)) for _ in range(2))
        start = self.forward([Chunk(first, token_ids[:3]), Chunk(second, token_ids[:1])])
        rest = self.forward([Chunk(first, token_ids[3:]), Chunk(second, token_ids[1:])])
        ours = torch.cat((start[:3], rest[:5], start[3:], rest[5:]))
        tolerance = 1e-3 if self.kv_shape.dtype is torch.float32 else 0.1
        difference = (ours - torch.cat((expected, expected))).abs().max()
        if not difference <= tolerance * expected.abs().max():
            raise UnsupportedModel(f"the attention of {type(self.model).__name__}")


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raises `UnsupportedModel` where attention is more than causal softmax over all tokens."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise UnsupportedModel(f"layers of type {', '.join(sorted(kinds))}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModel(f"softcapped attention ({config.attn_logit_softcapping})")
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        raise UnsupportedModel("attention sinks")
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of parameters for all layers, or one for each type of layer.
    by_layer = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    types = {parameters.get("rope_type") or "default" for parameters in by_layer}
    if unknown := types - _STATIC_ROPE_TYPES:
        raise UnsupportedModel(f"rotary embedding of type {', '.join(sorted(unknown))}")
    if not getattr(config, "is_causal", True):
        raise UnsupportedModel("bidirectional attention")
