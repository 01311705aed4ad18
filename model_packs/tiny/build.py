"""Builds the pack, one stage a call: `python -m model_packs.tiny.build --work FOLDER STAGE …`.

Stages in order: language-model (several), rollouts, reward-model, pairs, router, evaluate, export.
Each reads what the ones before left in the work folder and can be run again after an interruption.
"""

import argparse
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
)

from model_packs.tiny import language_model, pack, reward_model, router_model
from model_packs.tiny.calibration import calibrate, router_metadata
from model_packs.tiny.domain import Problem, Split, problems
from model_packs.tiny.generation import Encoder, StepWriter
from model_packs.tiny.pairs import collect, read_pairs
from model_packs.tiny.recipe import (
    CALIBRATION_PROBLEM_COUNT,
    DRAFT,
    LANGUAGE_MODEL_STAGES,
    PAIR_PROBLEM_COUNT,
    REWARD,
    REWARD_TRUNK,
    ROLLOUT_PROBLEM_COUNT,
    ROLLOUT_WRITERS,
    ROUTER,
    ROUTER_TRUNK,
    SEEDS,
    TARGET,
)
from model_packs.tiny.report import evaluate
from model_packs.tiny.rollouts import write_rollouts
from model_packs.tiny.tokenizer import build_tokenizer

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

    def _reward_model(self) -> LlamaForTokenClassification:
        model: LlamaForTokenClassification = LlamaForTokenClassification.from_pretrained(
            self._work / "prm"
        )
        return model

    def _estimator(self) -> router_model.AdvantageEstimator:
        trained = LlamaForSequenceClassification.from_pretrained(self._work / "router")
        return router_model.AdvantageEstimator(trained, self._encoder)

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

    def pairs(self, part: int) -> None:
        """Walks one part of the training problems with both models."""
        asked = drawn(Split.TRAINING, SEEDS["pairs"] + part, PAIR_PROBLEM_COUNT)
        path = self._work / f"pairs-{part}.jsonl"
        collect(asked, self._writer(DRAFT), self._writer(TARGET), path, SEEDS["pairs"] + part)

    def router(self) -> None:
        """Labels all pairs and trains the router on a balanced sample of them."""
        pairs = [p for path in sorted(self._work.glob("pairs-*.jsonl")) for p in read_pairs(path)]
        model = self._reward_model()
        rows = router_model.label_pairs(pairs, reward_model.StepScorer(model, self._encoder))
        chosen = router_model.balanced(rows, SEEDS["balance"])
        counts = {
            "pairs": len(rows),
            "positive_share": sum(row.label for row in rows) / len(rows),
            "rows_after_balancing": len(chosen),
            "digest": router_model.rows_digest(chosen),
        }
        pack.write_atomically(self._work / "router-rows.json", json.dumps(counts))
        log.info("router rows: %s", counts)
        router_model.train(chosen, ROUTER, model, self._work / ROUTER_TRUNK, self._work)

    def calibrate(self) -> None:
        """Measures shares and accuracy over thresholds and chooses the default."""
        asked = drawn(Split.CALIBRATION, SEEDS["calibration"], CALIBRATION_PROBLEM_COUNT)
        found = calibrate(asked, self._writer(DRAFT), self._writer(TARGET), self._estimator())
        pack.write_atomically(self._work / "calibration.json", json.dumps(found, indent=2))

    def evaluate(self) -> None:
        """Measures everything on the held-out problems."""
        threshold = json.loads((self._work / "calibration.json").read_text())["default_threshold"]
        scorer = reward_model.StepScorer(self._reward_model(), self._encoder)
        found = evaluate(
            pack.held_out_problems(),
            self._writer(DRAFT),
            self._writer(TARGET),
            scorer,
            self._estimator(),
            threshold,
        )
        pack.write_atomically(self._work / "evaluation.json", json.dumps(found, indent=2))

    def export(self) -> None:
        """Writes the pack's folders, its problems and its manifest."""
        sources: list[tuple[str, str, type[PreTrainedModel], dict[str, object] | None]] = [
            ("draft", DRAFT, LlamaForCausalLM, None),
            ("target", TARGET, LlamaForCausalLM, None),
            ("prm", "prm", LlamaForTokenClassification, reward_model.METADATA),
            (
                "router",
                "router",
                LlamaForSequenceClassification,
                router_metadata(self._work),
            ),
        ]
        for name, source, kind, metadata in sources:
            pack.export(kind.from_pretrained(self._work / source), name, metadata)
        pack.write_problems()
        pack.write_manifest()


STAGES: Final = ("rollouts", "reward_model", "router", "calibrate", "evaluate", "export")


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
    collecting = stages.add_parser("pairs", help=Build.pairs.__doc__)
    collecting.add_argument("part", type=int, help="which part of the problems, from 0")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    build = Build(arguments.work)
    match arguments.stage:
        case "language-model":
            build.language_model(arguments.name)
        case "pairs":
            build.pairs(arguments.part)
        case stage:
            run: Callable[[], None] = getattr(build, stage.replace("-", "_"))
            run()


if __name__ == "__main__":
    main()
