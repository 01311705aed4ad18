"""Trains on small rows as one of several processes: `torchrun -m tests.training.together`."""

from __future__ import annotations

import sys
from pathlib import Path

from router_training.stages import is_first_process
from router_training.train import score_rule, train
from tests.training.test_train import rows, settings

if __name__ == "__main__":
    init, folder = map(Path, sys.argv[1:])
    data, used = rows(64), settings(init, batch_rows=4)
    found = train((data, data), (0.0,), score_rule("softmax", 2), used, folder)
    if is_first_process():
        sys.stdout.write(f"{found['step_count']} {found['validation_rho']}\n")
