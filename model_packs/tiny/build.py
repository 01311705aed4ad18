"""Builds the pack, one stage a call: `python -m model_packs.tiny.build --work FOLDER STAGE …`.

Stages in order: language-model (several), rollouts, reward-model, export, and once
`router_training` has made a router for what was exported, router.
Each reads what the ones before left in the work folder and can be run again after an interruption.
"""

import argparse
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from transformers import (
    LlamaForCausalLM,
    LlamaForTokenClassification,
    PreTrainedModel,
)

from model_packs.tiny import language_model, pack, reward_model
from model_packs.tiny.domain import Problem, Split, problems
from model_packs.tiny.generation import Encoder, StepWriter
from model_packs.tiny.recipe import (
    DRAFT,
    LANGUAGE_MODEL_STAGES,
    QUESTION_COUNT,
    REWARD,
    REWARD_TRUNK,
    ROLLOUT_PROBLEM_COUNT,
    ROLLOUT_WRITERS,
    ROUTER_CONFIG,
    SEEDS,
    TARGET,
)
from model_packs.tiny.rollouts import write_rollouts
from model_packs.tiny.tokenizer import build_tokenizer
from router_training.config import read_config
from services.engines.revisions import RevisionStore

log = logging.getLogger(__name__)


def drawn(split: Split, seed: int, count: int) -> list[Problem]:
    """Returns `count` problems of a split."""
    return list(itertools.islice(problems(seed, split), count))


class Build:
    """Knows where each stage's results lie and runs the stages."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._encoder = Encoder(build_tokenizer())

    def _writer(self, name: str) -> StepWriter:
        return StepWriter(LlamaForCausalLM.from_pretrained(self._work / name), self._encoder)

    def language_model(self, name: str) -> None:
        """Trains one stage of a language model."""
        language_model.train(name, LANGUAGE_MODEL_STAGES[name], self._work)

    def rollouts(self) -> None:
        """Lets draft and target make mistakes for the reward model to learn from."""
        asked = drawn(Split.TRAINING, SEEDS["rollouts"], ROLLOUT_PROBLEM_COUNT)
        writers = [self._writer(name) for name in ROLLOUT_WRITERS]
        write_rollouts(asked, writers, self._work / "rollouts.jsonl", SEEDS["rollouts"])

    def reward_model(self) -> None:
        """Trains the reward model."""
        trunk = self._work / REWARD_TRUNK
        reward_model.train(REWARD, trunk, self._work / "rollouts.jsonl", self._work)

    def export(self) -> None:
        """Writes the folders of draft, target and PRM, the problems, and the questions."""
        sources: list[tuple[str, str, type[PreTrainedModel], dict[str, object] | None]] = [
            ("draft", DRAFT, LlamaForCausalLM, None),
            ("target", TARGET, LlamaForCausalLM, None),
            ("prm", "prm", LlamaForTokenClassification, reward_model.METADATA),
        ]
        for name, source, kind, metadata in sources:
            pack.export(kind.from_pretrained(self._work / source), name, metadata)
        pack.write_problems()
        pack.write_questions(drawn(Split.TRAINING, SEEDS["questions"], QUESTION_COUNT))
        pack.write_manifest()

    def router(self) -> None:
        """Takes the router that `router_training` promoted into the pack."""
        store = RevisionStore(read_config(ROUTER_CONFIG).promote.location)
        revision = store.current()
        if revision is None:
            raise SystemExit(f"{store.location}: nothing is promoted; run router_training first")
        pack.take_router(store.fetch(revision, self._work))
        pack.write_manifest()


STAGES: Final = ("rollouts", "reward_model", "export", "router")


def main() -> None:
    """Runs the named stage."""
    parser = argparse.ArgumentParser(prog="model_packs.tiny.build", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--threads", type=int, default=1, help="processor threads to compute with")
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in STAGES:
        stages.add_parser(name.replace("_", "-"), help=getattr(Build, name).__doc__)
    training = stages.add_parser("language-model", help=Build.language_model.__doc__)
    training.add_argument("name", choices=LANGUAGE_MODEL_STAGES)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    build = Build(arguments.work)
    match arguments.stage:
        case "language-model":
            build.language_model(arguments.name)
        case stage:
            run: Callable[[], None] = getattr(build, stage.replace("-", "_"))
            run()


if __name__ == "__main__":
    main()
