"""What the services score is what training saw: one formatter, pinned by golden token ids."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

from arbitrage.core.steps import Source, Step, Trajectory
from model_packs.tiny.generation import Encoder
from model_packs.tiny.pairs import Pair
from model_packs.tiny.reward_model import StepScorer
from model_packs.tiny.router_model import AdvantageEstimator, router_ids
from model_packs.tiny.tokenizer import build_tokenizer
from services.engines.loading import ModelKind, load_model
from services.engines.transformers_scorers import TransformersPrm, TransformersRouter

PACK = Path(__file__).resolve().parents[2] / "model_packs" / "tiny"
PROBLEM = "Ann owns 14. Bob has 8 more than Ann. How many pens does Bob have?"
STEPS = (
    "Bob has 8 more than Ann: 14 + 8 = 22; Bob owns 22.",
    "Bob has 9 more than Ann: 14 + 9 = 23; Bob owns 23.",
)
# "Ann?", two steps "abc" by the target, then the candidate "abc", each closed.
GOLDEN = [
    258,
    32,
    200,
    299,
    18,
    279,
    66,
    67,
    68,
    278,
    299,
    18,
    279,
    66,
    67,
    68,
    278,
    299,
    17,
    279,
    66,
    67,
    68,
    278,
]
CANDIDATE = "The answer is \\boxed{22}."


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(build_tokenizer())


def test_the_routers_input_has_the_golden_ids(encoder: Encoder) -> None:
    ids = router_ids(encoder, "Ann?", ("abc", "abc"), (1, 1), "abc")
    assert ids == GOLDEN


def test_a_longer_history_keeps_the_ids_of_the_shorter_one(encoder: Encoder) -> None:
    # An accepted candidate stands in the history as it was judged, so its keys and values serve.
    shorter = router_ids(encoder, PROBLEM, STEPS[:1], (1,), STEPS[1])
    longer = router_ids(encoder, PROBLEM, STEPS, (1, 0), CANDIDATE)
    assert longer[: len(shorter)] == shorter


@pytest.mark.slow
async def test_the_router_service_scores_as_training_did(encoder: Encoder) -> None:
    writers = (0, 1)
    pair = Pair(PROBLEM, PROBLEM, STEPS, writers, CANDIDATE, "", True, True, True, "")
    stock = LlamaForSequenceClassification.from_pretrained(PACK / "router")
    (expected,) = AdvantageEstimator(stock, encoder).estimate([pair])
    engine = await asyncio.to_thread(
        lambda: TransformersRouter(
            load_model(str(PACK / "router"), ModelKind.SEQUENCE_CLASSIFICATION)
        )
    )
    history = tuple(
        Step(text, source)
        for text, source in zip(STEPS, (Source.DRAFT, Source.TARGET), strict=True)
    )
    found = await engine.estimate_advantage(Trajectory(PROBLEM, history), CANDIDATE)
    await engine.close()
    assert found.score.value == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
async def test_the_prm_service_scores_as_training_did(encoder: Encoder) -> None:
    stock = LlamaForTokenClassification.from_pretrained(PACK / "prm")
    (expected,) = StepScorer(stock, encoder).score([(PROBLEM, (*STEPS, CANDIDATE))])
    engine = await asyncio.to_thread(
        lambda: TransformersPrm(load_model(str(PACK / "prm"), ModelKind.TOKEN_CLASSIFICATION))
    )
    steps = tuple(Step(text, Source.DRAFT) for text in (*STEPS, CANDIDATE))
    found = await engine.score_steps(PROBLEM, steps)
    await engine.close()
    assert found.values == pytest.approx(expected, abs=1e-4)
