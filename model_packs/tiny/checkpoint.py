"""Saves and restores a training run; a file is whole or absent, never half written."""

import os
from pathlib import Path

import torch
from torch import nn

from model_packs.tiny.optimizer import Optimizers


def save_checkpoint(path: Path, model: nn.Module, optimizers: Optimizers, step: int) -> None:
    """Writes the run's state after `step` steps in one rename."""
    part = path.with_suffix(".part")
    torch.save(
        {"model": model.state_dict(), "optimizers": optimizers.state_dict(), "step": step}, part
    )
    os.replace(part, path)


def load_checkpoint(path: Path, model: nn.Module, optimizers: Optimizers) -> int:
    """Restores a run if `path` exists and returns the number of steps done, 0 for a fresh run."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizers"])
    return int(state["step"])
