"""What the services score is what training saw: one formatter, pinned by golden token ids."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

from arbitrage.core.steps import Source, Step, Trajectory
from model_packs.tiny.generation import Encoder
from model_packs.tiny.reward_model import StepScorer
from model_packs.tiny.tokenizer import build_tokenizer
from router_training.encode import Encoder as RowEncoder
from router_training.rows import Row
from services.engines.loading import ModelKind, load_model
from services.engines.router_input import CandidateTooLong
from services.engines.transformers_scorers import TransformersPrm, TransformersRouter
from tests.training.rows import a_row

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


def row(history: tuple[Step, ...], candidate: str, problem: str = PROBLEM) -> Row:
    """Returns a row that is this input."""
    return a_row(problem=problem, history=history, draft_text=candidate)


def training_encoder(*, annotated: bool, max_tokens: int = 4096) -> RowEncoder:
    """Returns what the training job reads rows with."""
    return RowEncoder(build_tokenizer(), annotated=annotated, max_tokens=max_tokens)


ABC = Step("abc", Source.TARGET)


def test_the_routers_input_has_the_golden_ids() -> None:
    assert training_encoder(annotated=True).ids(row((ABC, ABC), "abc", "Ann?")) == GOLDEN


def test_plain_input_is_the_annotated_one_without_its_writers() -> None:
    plain = training_encoder(annotated=False).ids(row((ABC, ABC), "abc", "Ann?"))
    assert plain == [*GOLDEN[:3], *(66, 67, 68, 278) * 3]


def test_a_longer_history_keeps_the_ids_of_the_shorter_one() -> None:
    # An accepted candidate stands in the history as it was judged, so its keys and values serve.
    encoder = training_encoder(annotated=True)
    first, second = Step(STEPS[0], Source.TARGET), Step(STEPS[1], Source.DRAFT)
    shorter = encoder.ids(row((first,), STEPS[1]))
    longer = encoder.ids(row((first, second), CANDIDATE))
    assert longer[: len(shorter)] == shorter


def test_what_does_not_fit_is_cut_from_the_history_and_never_from_the_candidate() -> None:
    history = tuple(Step(text, Source.DRAFT) for text in STEPS * 3)
    whole = training_encoder(annotated=False).ids(row(history, CANDIDATE))
    bare = training_encoder(annotated=False).ids(row((), CANDIDATE))
    room = len(bare) + 10
    cut = training_encoder(annotated=False, max_tokens=room).ids(row(history, CANDIDATE))
    problem_count = len(build_tokenizer().encode(PROBLEM + "\n"))
    assert len(cut) == room
    assert cut[:problem_count] == whole[:problem_count]
    assert cut[problem_count:] == whole[len(whole) - room + problem_count :]
    with pytest.raises(CandidateTooLong):
        training_encoder(annotated=False, max_tokens=len(bare) - 1).ids(row(history, CANDIDATE))


@pytest.mark.slow
async def test_the_router_service_scores_as_training_did() -> None:
    history = tuple(
        Step(text, source)
        for text, source in zip(STEPS, (Source.DRAFT, Source.TARGET), strict=True)
    )
    stock = LlamaForSequenceClassification.from_pretrained(PACK / "router")
    engine = await asyncio.to_thread(
        lambda: TransformersRouter(
            load_model(str(PACK / "router"), ModelKind.SEQUENCE_CLASSIFICATION)
        )
    )
    annotated = engine.description.is_annotated
    ids = torch.tensor([training_encoder(annotated=annotated).ids(row(history, CANDIDATE))])
    with torch.inference_mode():
        expected = stock(ids).logits.softmax(-1)[0, 1].item()
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
