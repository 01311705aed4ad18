"""Writes models' mistakes for the reward model: whole solutions and single wrong steps."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from model_packs.tiny.domain import Problem
from model_packs.tiny.generation import StepWriter, solve_all
from model_packs.tiny.pack import write_atomically


def write_rollouts(
    problems: Sequence[Problem], writers: Sequence[StepWriter], path: Path, seed: int
) -> None:
    """Writes one JSON object a line: {"problem", "steps"}; solutions with no mistake are left out.

    Half of the problems are solved whole, mistakes and all that follows. On the other half
    every writer writes one step after each correct prefix, and the wrong ones are kept: the
    place where checking matters.
    """
    rng = random.Random(seed)
    texts: list[tuple[str, tuple[str, ...]]] = []
    whole = [p for p in problems if rng.random() < 0.5]
    whole_ids = {p.problem_id for p in whole}
    single = [p for p in problems if p.problem_id not in whole_ids]
    for writer in writers:
        solved = solve_all(writer, [p.text for p in whole])
        texts += [
            (p.text, steps) for p, steps in zip(whole, solved, strict=True) if steps != p.steps
        ]
        prefixes = [(p, p.steps[:count]) for p in single for count in range(len(p.steps))]
        wrote = writer.write([(p.text, prefix) for p, prefix in prefixes])
        for (p, prefix), step in zip(prefixes, wrote, strict=True):
            if step.text != p.steps[len(prefix)]:
                texts.append((p.text, (*prefix, step.text)))
    lines = [json.dumps({"problem": text, "steps": steps}) for text, steps in texts]
    write_atomically(path, "\n".join(lines) + "\n")
