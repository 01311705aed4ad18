"""Scorers read what the stock model's forward says, whatever is cached and whoever else asks."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedModel

from arbitrage.core.errors import ContextTooLong, NotServing, Overloaded
from arbitrage.core.steps import Source, Step, Trajectory
from services.engines.loading import LoadedModel, ModelKind, ModelLoadError, load_model
from services.engines.scheduler import EngineOptions
from services.engines.tokenization import PieceTokenizer
from services.engines.transformers_scorers import TransformersPrm, TransformersRouter
from tests.services.engine_models import byte_tokenizer, random_classifier, save, until
from tests.services.test_engines_router_format import GOOD

_ROUNDING = 1e-5  # float32 sums taken in another order, through a head with weights of 0.4
_STEPS = (
    Step("Bob has 8 more than Ann: 14 + 8 = 22.", Source.DRAFT),
    Step("Eve has half as many: 11.", Source.TARGET),
    Step("That is €11.", Source.DRAFT),
)


@pytest.fixture(scope="module")
def token_classifier() -> PreTrainedModel:
    return random_classifier("token", 2)


@pytest.fixture(scope="module")
def sequence_classifier() -> PreTrainedModel:
    return random_classifier("sequence", 2)


@pytest.fixture(scope="module")
def prm_model(
    token_classifier: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> LoadedModel:
    folder = tmp_path_factory.mktemp("prm")
    return load_model(save(folder, token_classifier), ModelKind.TOKEN_CLASSIFICATION)


@pytest.fixture(scope="module")
def router_model(
    sequence_classifier: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> LoadedModel:
    return _router_folder(tmp_path_factory.mktemp("router"), sequence_classifier)


def _router_folder(folder: Path, model: PreTrainedModel, **changes: Any) -> LoadedModel:
    reference = save(folder, model)
    (folder / "router.json").write_text(json.dumps(GOOD | changes))
    return load_model(reference, ModelKind.SEQUENCE_CLASSIFICATION)


StartPrm = Callable[..., Awaitable[TransformersPrm]]
StartRouter = Callable[..., Awaitable[TransformersRouter]]


@pytest.fixture
async def start_prm() -> AsyncIterator[StartPrm]:
    engines: list[TransformersPrm] = []

    async def start(loaded: LoadedModel, **options: int) -> TransformersPrm:
        engine = await asyncio.to_thread(TransformersPrm, loaded, EngineOptions(**options))
        engines.append(engine)
        return engines[-1]

    yield start
    for engine in engines:
        await engine.close()


@pytest.fixture
async def start_router() -> AsyncIterator[StartRouter]:
    engines: list[TransformersRouter] = []

    async def start(loaded: LoadedModel, **options: int) -> TransformersRouter:
        engine = await asyncio.to_thread(TransformersRouter, loaded, EngineOptions(**options))
        engines.append(engine)
        return engines[-1]

    yield start
    for engine in engines:
        await engine.close()


def _ids(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer().encode(text, add_special_tokens=False)
    return ids


@torch.inference_mode()
def _stock_step_scores(model: PreTrainedModel, prompt: str, steps: tuple[Step, ...]) -> list[float]:
    ids, positions = _ids(prompt), []
    for step in steps:
        ids += _ids(step.text) + _ids("\n\n")
        positions.append(len(ids) - 1)
    shares = model(torch.tensor([ids])).logits[0].softmax(-1)
    return [float(shares[position, 1]) for position in positions]


@torch.inference_mode()
def _stock_advantage(model: PreTrainedModel, problem: str, *texts: str) -> float:
    ids = _ids(problem + "\n")
    for text in texts:
        ids += _ids(text) + _ids("\n\n")[-1:]
    return float(model(torch.tensor([ids])).logits[0].softmax(-1)[1])


async def test_step_scores_are_those_of_the_stock_model(
    start_prm: StartPrm, prm_model: LoadedModel, token_classifier: PreTrainedModel
) -> None:
    scores = await (await start_prm(prm_model)).score_steps("1 + 1?", _STEPS)

    expected = _stock_step_scores(token_classifier, "1 + 1?", _STEPS)
    assert scores.values == pytest.approx(expected, abs=_ROUNDING)
    assert max(expected) - min(expected) > 0.05  # the model says different things
    assert scores.model == prm_model.identity


async def test_skipped_steps_are_read_but_not_scored(
    start_prm: StartPrm, prm_model: LoadedModel
) -> None:
    engine = await start_prm(prm_model)
    everything = await engine.score_steps("1 + 1?", _STEPS)
    last = await engine.score_steps("1 + 1?", _STEPS, skip_count=2)
    nothing = await engine.score_steps("1 + 1?", _STEPS, skip_count=3)

    assert last.values == pytest.approx(everything.values[2:], abs=_ROUNDING)
    assert last.prefill_token_count == 1
    assert nothing.values == ()


async def test_a_scored_prefix_costs_nothing_and_changes_nothing(
    start_prm: StartPrm, prm_model: LoadedModel
) -> None:
    engine = await start_prm(prm_model)
    for count in (1, 2, 3):
        warm = await engine.score_steps("1 + 1?", _STEPS[:count], count - 1)
        cold = await (await start_prm(prm_model)).score_steps("1 + 1?", _STEPS[:count], count - 1)

        known_text = "1 + 1?" + "".join(step.text + "\n\n" for step in _STEPS[: count - 1])
        assert warm.values == pytest.approx(cold.values, abs=_ROUNDING)
        assert warm.cached_token_count == (len(_ids(known_text)) if count > 1 else 0)
        assert cold.cached_token_count == 0


async def test_a_score_is_the_same_alone_and_among_others(
    start_prm: StartPrm, prm_model: LoadedModel
) -> None:
    problems = [f"{number} + 1?" + " " * number for number in range(24)]
    alone = [
        await (await start_prm(prm_model)).score_steps(problem, _STEPS) for problem in problems
    ]

    engine = await start_prm(prm_model, prefill_chunk_tokens=100)
    together = await asyncio.gather(*(engine.score_steps(problem, _STEPS) for problem in problems))

    for one, other in zip(alone, together, strict=True):
        assert other.values == pytest.approx(one.values, abs=_ROUNDING)


async def test_a_prm_with_other_metadata_reads_it(
    start_prm: StartPrm, tmp_path: Path, token_classifier: PreTrainedModel
) -> None:
    reference = save(tmp_path, token_classifier)
    metadata = {
        "format_version": 1,
        "family": "trl-token-classification",
        "separator": "##",
        "positive_label": 0,
        "prompt_suffix": "\n",
    }
    (tmp_path / "prm.json").write_text(json.dumps(metadata))
    engine = await start_prm(
        await asyncio.to_thread(load_model, reference, ModelKind.TOKEN_CLASSIFICATION)
    )

    scores = await engine.score_steps("1?", _STEPS[:1])

    ids = _ids("1?\n" + _STEPS[0].text + "##")  # the suffix that the metadata name
    with torch.inference_mode():
        shares = token_classifier(torch.tensor([ids])).logits[0, -1].softmax(-1)
    assert scores.values == pytest.approx([float(shares[0])], abs=_ROUNDING)


class _Recording(PieceTokenizer):
    """Notes which pieces are tokenised, and whether in the event loop's thread."""

    def __init__(self) -> None:
        self.pieces: list[tuple[str, bool]] = []
        super().__init__(byte_tokenizer())

    def _encode(self, piece: str) -> tuple[int, ...]:
        is_inline = threading.current_thread() is threading.main_thread()
        self.pieces.append((piece, is_inline))
        return super()._encode(piece)


async def test_long_texts_are_tokenised_once_and_off_the_event_loop(
    start_prm: StartPrm,
    start_router: StartRouter,
    prm_model: LoadedModel,
    router_model: LoadedModel,
) -> None:
    problem = "x" * 20_000
    tokenizer = _Recording()
    prm = await start_prm(replace(prm_model, tokenizer=tokenizer))
    router = await start_router(replace(router_model, tokenizer=tokenizer))

    with pytest.raises(ContextTooLong):
        await prm.score_steps(problem, _STEPS)
    with pytest.raises(ContextTooLong):
        await router.estimate_advantage(Trajectory(problem), "abc")

    long_pieces = [(piece, inline) for piece, inline in tokenizer.pieces if len(piece) > 1000]
    assert long_pieces == [(problem, False), (problem + "\n", False)]


@pytest.mark.parametrize(
    ("head", "kind", "engine"),
    [
        ("token", ModelKind.TOKEN_CLASSIFICATION, TransformersPrm),
        ("sequence", ModelKind.SEQUENCE_CLASSIFICATION, TransformersRouter),
    ],
    ids=["prm", "router"],
)
def test_a_scorer_whose_tokenizer_loses_the_separator_is_refused(
    tmp_path: Path,
    head: str,
    kind: ModelKind,
    engine: Callable[[LoadedModel], TransformersPrm | TransformersRouter],
) -> None:
    tokenizer = byte_tokenizer(())
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    reference = save(tmp_path, random_classifier(head, 2), tokenizer)
    (tmp_path / "router.json").write_text(json.dumps(GOOD))

    loaded = load_model(reference, kind)

    with pytest.raises(ModelLoadError, match=r"the separator .* into no token"):
        engine(loaded)


async def test_steps_too_long_for_the_prm_are_refused(
    start_prm: StartPrm, prm_model: LoadedModel
) -> None:
    engine = await start_prm(prm_model)

    with pytest.raises(ContextTooLong, match="4096 tokens"):
        await engine.score_steps("x" * 5000, _STEPS)
    assert engine.stats().prefill_token_count == 0


async def test_megabytes_are_refused_before_they_are_tokenised(
    start_prm: StartPrm,
    start_router: StartRouter,
    prm_model: LoadedModel,
    router_model: LoadedModel,
) -> None:
    text, tokenizer = "x" * 1_000_000, _Recording()
    prm = await start_prm(replace(prm_model, tokenizer=tokenizer))
    router = await start_router(replace(router_model, tokenizer=tokenizer))

    with pytest.raises(ContextTooLong):
        await prm.score_steps(text, _STEPS)
    for problem, candidate in ((text, "a"), ("1?", text)):
        with pytest.raises(ContextTooLong):
            await router.estimate_advantage(Trajectory(problem), candidate)

    assert [piece for piece, _ in tokenizer.pieces if len(piece) > 1000] == []


def test_a_prm_with_bad_metadata_is_refused(
    tmp_path: Path, token_classifier: PreTrainedModel
) -> None:
    reference = save(tmp_path, token_classifier)
    (tmp_path / "prm.json").write_text('{"format_version": 1, "family": "skywork"}')

    with pytest.raises(ModelLoadError, match=r"prm\.json: family: unknown family 'skywork'"):
        TransformersPrm(load_model(reference, ModelKind.TOKEN_CLASSIFICATION))


def test_a_prm_with_three_labels_is_refused(tmp_path: Path) -> None:
    loaded = load_model(
        save(tmp_path, random_classifier("token", 3)), ModelKind.TOKEN_CLASSIFICATION
    )
    with pytest.raises(ModelLoadError, match=r"gives 3 logits.*gives 2"):
        TransformersPrm(loaded)


async def test_an_advantage_is_that_of_the_stock_model(
    start_router: StartRouter, router_model: LoadedModel, sequence_classifier: PreTrainedModel
) -> None:
    engine = await start_router(router_model)
    trajectory = Trajectory("1 + 1?", (Step("abc", Source.TARGET), Step("de", Source.DRAFT)))

    advantage = await engine.estimate_advantage(trajectory, "abc")

    texts = ("Model 1: abc", "Model 0: de", "Model 0: abc")
    expected = _stock_advantage(sequence_classifier, "1 + 1?", *texts)
    assert advantage.score.value == pytest.approx(expected, abs=_ROUNDING)
    assert advantage.truncated_token_count == 0
    assert engine.description.is_annotated
    assert engine.description.default_threshold == 0.4
    assert engine.description.calibration.thresholds == (0.2, 0.6)


async def test_a_router_without_annotation_reads_bare_steps(
    start_router: StartRouter, tmp_path: Path, sequence_classifier: PreTrainedModel
) -> None:
    engine = await start_router(
        await asyncio.to_thread(_router_folder, tmp_path, sequence_classifier, annotation=False)
    )

    advantage = await engine.estimate_advantage(Trajectory("1?", _STEPS[1:2]), "abc")

    expected = _stock_advantage(sequence_classifier, "1?", _STEPS[1].text, "abc")
    assert advantage.score.value == pytest.approx(expected, abs=_ROUNDING)


@pytest.mark.parametrize(
    ("kind", "logit_count"), [("quantile", 4), ("ordinal", 3)], ids=["quantile", "ordinal"]
)
async def test_rules_of_many_classes_read_their_heads(
    start_router: StartRouter, tmp_path: Path, kind: str, logit_count: int
) -> None:
    model = random_classifier("sequence", logit_count)
    rule = {"kind": kind, "first_positive_class": 2}
    engine = await start_router(
        await asyncio.to_thread(_router_folder, tmp_path, model, score_rule=rule, num_labels=4)
    )

    advantage = await engine.estimate_advantage(Trajectory("1?"), "abc")

    with torch.inference_mode():
        logits = model(torch.tensor([_ids("1?\nModel 0: abc\n\n")])).logits[0]
    expected = logits.softmax(-1)[2:].sum() if kind == "quantile" else logits[1].sigmoid()
    assert advantage.score.value == pytest.approx(float(expected), abs=_ROUNDING)


@pytest.mark.parametrize(
    ("head", "rule", "classes", "message"),
    [
        (4, {"kind": "softmax", "positive_class": 1}, 2, "4 logits.*'softmax' for 2 .* reads 2"),
        (4, {"kind": "ordinal", "first_positive_class": 2}, 4, "4 logits.*'ordinal'.*reads 3"),
        (3, {"kind": "quantile", "first_positive_class": 2}, 4, "3 logits.*'quantile'.*reads 4"),
    ],
)
def test_a_head_that_does_not_match_its_metadata_is_refused(
    tmp_path: Path, head: int, rule: dict[str, Any], classes: int, message: str
) -> None:
    loaded = _router_folder(
        tmp_path, random_classifier("sequence", head), score_rule=rule, num_labels=classes
    )
    with pytest.raises(ModelLoadError, match=message):
        TransformersRouter(loaded)


def test_a_router_without_metadata_is_refused(
    tmp_path: Path, sequence_classifier: PreTrainedModel
) -> None:
    loaded = load_model(save(tmp_path, sequence_classifier), ModelKind.SEQUENCE_CLASSIFICATION)

    with pytest.raises(ModelLoadError, match=r"router\.json: cannot be read"):
        TransformersRouter(loaded)


async def test_an_accepted_candidate_is_known_next_time_and_a_rejected_one_is_not(
    start_router: StartRouter, router_model: LoadedModel
) -> None:
    engine = await start_router(router_model)
    start = Trajectory("A problem of some length")
    await engine.estimate_advantage(start, "abc")
    accepted = start.append(Step("abc", Source.DRAFT))
    rejected = start.append(Step("xyz", Source.TARGET))

    after_rejection = await engine.estimate_advantage(rejected, "de")
    after_acceptance = await engine.estimate_advantage(accepted, "de")

    known_start = "A problem of some length\nModel "
    assert after_rejection.score.cached_token_count == len(_ids(known_start))
    assert after_acceptance.score.cached_token_count == len(
        _ids(known_start + "0: abc\n\nModel 0: ")
    ) - len(_ids("Model 0: "))


async def test_history_too_long_for_the_router_is_cut_from_the_left(
    start_router: StartRouter, router_model: LoadedModel, sequence_classifier: PreTrainedModel
) -> None:
    per_token = router_model.packed.kv_shape.bytes_per_token
    engine = await start_router(router_model, cache_bytes=80 * per_token)
    trajectory = Trajectory("1 + 1?", _STEPS)

    advantage = await engine.estimate_advantage(trajectory, "abc")

    problem, candidate = _ids("1 + 1?\n"), _ids("Model 0: abc\n\n")
    history = [
        token_id
        for step, number in zip(_STEPS, (0, 1, 0), strict=True)
        for token_id in _ids(f"Model {number}: {step.text}\n\n")
    ]
    room = 80 - len(problem) - len(candidate)
    with torch.inference_mode():
        ids = problem + history[-room:] + candidate
        expected = sequence_classifier(torch.tensor([ids])).logits[0].softmax(-1)[1]
    assert advantage.score.value == pytest.approx(float(expected), abs=_ROUNDING)
    assert advantage.truncated_token_count == len(history) - room > 0


async def test_a_candidate_is_never_cut(
    start_router: StartRouter, router_model: LoadedModel
) -> None:
    per_token = router_model.packed.kv_shape.bytes_per_token
    engine = await start_router(router_model, cache_bytes=40 * per_token)

    with pytest.raises(ContextTooLong, match="candidate tokens"):
        await engine.estimate_advantage(Trajectory("1?", _STEPS), "x" * 40)
    exactly = "x" * (40 - len(_ids("1?\nModel 0: \n\n")))
    advantage = await engine.estimate_advantage(Trajectory("1?", _STEPS), exactly)
    assert advantage.truncated_token_count > 0


async def test_an_advantage_is_the_same_alone_and_among_others(
    start_router: StartRouter, router_model: LoadedModel
) -> None:
    calls = [(Trajectory(f"{number}?", _STEPS[: number % 4]), "a" * number) for number in range(24)]
    alone = [await (await start_router(router_model)).estimate_advantage(*call) for call in calls]

    engine = await start_router(router_model)
    together = await asyncio.gather(*(engine.estimate_advantage(*call) for call in calls))

    for one, other in zip(alone, together, strict=True):
        assert other.score.value == pytest.approx(one.score.value, abs=_ROUNDING)


async def test_a_full_queue_refuses_a_score(start_prm: StartPrm, prm_model: LoadedModel) -> None:
    engine = await start_prm(prm_model, max_batch=1, max_queue=1, prefill_chunk_tokens=1)
    steps = (Step("x" * 2000, Source.DRAFT),)
    tasks = [asyncio.create_task(engine.score_steps("1?", steps)) for _ in range(2)]
    await until(lambda: engine.stats().running_requests > 0)

    with pytest.raises(Overloaded):
        await engine.score_steps("1?", steps)

    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    # Those two no longer count, and leave within a forward: a third gets in and through.
    assert len((await engine.score_steps("1?", _STEPS)).values) == 3
    assert engine.stats().prefill_token_count < 2000


async def test_closing_a_scorer_ends_what_runs(start_prm: StartPrm, prm_model: LoadedModel) -> None:
    engine = await start_prm(prm_model, prefill_chunk_tokens=1)
    steps = (Step("x" * 3000, Source.DRAFT),)
    task = asyncio.create_task(engine.score_steps("1?", steps))
    await until(lambda: engine.stats().running_requests > 0)

    await engine.close()

    with pytest.raises(NotServing):
        await task


async def test_warming_up_scores_once(
    start_prm: StartPrm,
    start_router: StartRouter,
    prm_model: LoadedModel,
    router_model: LoadedModel,
) -> None:
    for engine in (await start_prm(prm_model), await start_router(router_model)):
        await engine.warm_up()
        assert engine.stats().prefill_token_count > 0
