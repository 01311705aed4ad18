"""Muon for the hidden matrices, AdamW for embeddings and norms.

Muon (Jordan et al., 2024) orthogonalises each matrix's momentum by a Newton-Schulz iteration. The
version in torch iterates in bfloat16, which these processors emulate; this one runs in float32 and
treats all matrices of one shape in one batched product.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Returns nearly the closest semi-orthogonal matrices of a [count, rows, columns] batch."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Steps every matrix along its orthogonalised Nesterov momentum."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no caller passes a closure
        """Updates all matrices, those of one shape together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                directions = []
                for parameter in parameters:
                    assert parameter.grad is not None
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    directions.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(
                    parameters, orthogonalise(torch.stack(directions)), strict=True
                ):
                    parameter.add_(update, alpha=-group["lr"] * scale)


class Optimizers:
    """Drives both optimisers as one; `rate` scales their learning rates."""

    def __init__(self, model: nn.Module, muon_rate: float, adam_rate: float) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        hidden = [p for n, p in named if p.ndim == 2 and ".layers." in n]
        others = [p for n, p in named if not (p.ndim == 2 and ".layers." in n)]
        self._base = (muon_rate, adam_rate)
        self._muon = Muon(hidden, muon_rate)
        self._adam = torch.optim.AdamW(others, adam_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, rate: float) -> None:
        """Applies the gradients at `rate` times the base learning rates and clears them."""
        for optimizer, base in zip((self._muon, self._adam), self._base, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        """Returns both states, for a checkpoint."""
        return [self._muon.state_dict(), self._adam.state_dict()]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        """Restores both states from a checkpoint."""
        self._muon.load_state_dict(states[0])
        self._adam.load_state_dict(states[1])
