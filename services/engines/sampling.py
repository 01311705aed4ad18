"""Draws tokens from logits. Each request has a generator of its own, so no neighbour matters."""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

from arbitrage.core.steps import Sampling


class TokenSampler:
    """Draws the tokens of one step; the step's index is part of the seed."""

    def __init__(self, sampling: Sampling, step_index: int) -> None:
        self._sampling = sampling
        # Always on the CPU: a seed then draws alike on every device.
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            digest = sha256(f"{sampling.seed}:{step_index}".encode()).digest()
            self._generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def draw(self, logits: Tensor) -> int:
        """Returns a token drawn by `logits` [vocabulary], after temperature, top_k and top_p."""
        sampling = self._sampling
        logits = logits.double() / sampling.temperature
        token_ids: Tensor | None = None
        if sampling.top_k > 0:
            logits, token_ids = logits.topk(min(sampling.top_k, len(logits)))
        probabilities = logits.softmax(-1)
        if sampling.top_p < 1.0:
            probabilities, order = probabilities.sort(descending=True, stable=True)
            token_ids = order if token_ids is None else token_ids[order]
            # The smallest set that reaches top_p: a token stays if those before it do not.
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.where(before < sampling.top_p, 0.0)
        cumulative = probabilities.cumsum(-1)
        point = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        index = torch.searchsorted(cumulative, point * cumulative[-1], right=True)
        index = index.clamp(max=len(cumulative) - 1)
        return int(index if token_ids is None else token_ids[index])


def entropy_nats(logits: Tensor) -> float:
    """Returns the Shannon entropy in nats of the distribution of `logits` [vocabulary]."""
    logarithms = logits.double().log_softmax(-1)
    return float(-(logarithms.exp() * logarithms).nan_to_num(0.0).sum())
