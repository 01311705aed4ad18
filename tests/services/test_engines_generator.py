"""The generator writes what the model says and ends steps for the right reason."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from arbitrage.core.ports import StepRequest
from arbitrage.core.prompts import generator_pieces
from arbitrage.core.steps import Sampling, Source, Step, StopReason, Trajectory
from services.engines.loading import LoadedModel, ModelKind, load_model
from tests.services.engine_models import byte_tokenizer, random_model, save
from tests.services.engine_requests import (
    Start,
    after,
    generators,
    load_reciter,
    prompt_ids,
    reciting,
    walk,
    watch,
    write,
)


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return random_model()


@pytest.fixture(scope="module")
def loaded(stock: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    reference = save(tmp_path_factory.mktemp("models") / "random", stock)
    return load_model(reference, ModelKind.CAUSAL_LM)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model that never ends a step: after an "a" a "b", after a "b" an "a"."""
    return load_reciter(tmp_path_factory.mktemp("endless"), ("ab",), ends=False)


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with generators() as start_one:
        yield start_one


async def test_greedy_steps_are_those_of_the_stock_model(
    start: Start, loaded: LoadedModel, stock: PreTrainedModel
) -> None:
    engine = start(loaded)
    for number in range(4):
        trajectory = walk(number, number)
        step = await write(engine, StepRequest(trajectory, 40))

        ids = prompt_ids(loaded, trajectory)
        written = (
            cast("Any", stock)
            .generate(torch.tensor([ids]), max_new_tokens=step.token_count, do_sample=False)[
                0, len(ids) :
            ]
            .tolist()
        )
        assert step.token_count == len(written)
        if step.stop_reason is StopReason.STEP_LENGTH:
            while loaded.tokenizer.decode(written).endswith("\ufffd"):
                written.pop()  # half a character is left to the next step
        else:
            written.pop()
        expected = loaded.tokenizer.decode(written).strip("\n")
        assert step.text.strip("\n") == expected


@pytest.mark.parametrize(
    ("tokens", "added", "text", "token_count"),
    [
        (("Q", "a", "\n\n"), ("\n\n",), "a", 2),
        (("Q", "a", "\n", "\n"), (), "a", 3),
        (("Q", "a", ".\n\n"), (".\n\n",), "a.", 2),
        (("Q", "a", ".\n\nSo"), (".\n\nSo",), "a.", 2),
        (("Q", "a!\n", "\nb"), ("a!\n", "\nb"), "a!", 2),
        (("Q", "\n\n", "a", ".\n\n"), ("\n\n", ".\n\n"), "\n\na.", 3),
    ],
)
async def test_a_step_ends_at_its_separator(
    start: Start,
    tmp_path: Path,
    tokens: tuple[str, ...],
    added: tuple[str, ...],
    text: str,
    token_count: int,
) -> None:
    engine = start(await reciting(tmp_path, tokens, added))

    deltas, step = await watch(engine, StepRequest(after("Q"), 20, stream_text=True))

    assert (step.text, step.stop_reason) == (text, StopReason.SEPARATOR)
    assert step.token_count == token_count
    assert "".join(deltas) == text


async def test_the_end_of_the_sequence_ends_the_step(start: Start, tmp_path: Path) -> None:
    engine = start(await reciting(tmp_path, ("Q", "abc", "\n")))

    step = await write(engine, StepRequest(after("Q"), 20))

    assert (step.text, step.stop_reason) == ("abc\n", StopReason.END_OF_SEQUENCE)
    assert step.token_count == 5  # the end is a token, too


async def test_the_token_budget_ends_the_step(start: Start, tmp_path: Path) -> None:
    engine = start(await reciting(tmp_path, ("Q", "abcdef")))

    step = await write(engine, StepRequest(after("Q"), 4))

    assert (step.text, step.stop_reason, step.token_count) == ("abcd", StopReason.STEP_LENGTH, 4)


async def test_leading_separators_count_against_the_budget(start: Start, tmp_path: Path) -> None:
    engine = start(await reciting(tmp_path, ("\n", "\n\n", "abc")))

    step = await write(engine, StepRequest(Trajectory("Q"), 3))

    assert (step.text, step.stop_reason) == ("ab", StopReason.STEP_LENGTH)


@pytest.mark.parametrize("cap", range(4, 9))
async def test_cut_steps_join_to_the_text_of_an_uncut_one(
    start: Start, tmp_path: Path, cap: int
) -> None:
    engine = start(await reciting(tmp_path, ("Q", "aéb", "\n\n", "cd🙂e")))
    trajectory = after("Q")
    for _ in range(12):
        step = await write(engine, StepRequest(trajectory, cap))
        trajectory = trajectory.append(Step(step.text, Source.DRAFT, step.stop_reason))
        if step.stop_reason is StopReason.END_OF_SEQUENCE:
            break

    # A step that ends at its separator is closed by the prompt of the next.
    assert "".join(generator_pieces(trajectory)) == "\nQaéb\n\ncd🙂e\n\n"


async def test_no_time_left_ends_the_step_with_what_there_is(
    start: Start, endless: LoadedModel
) -> None:
    engine = start(endless)

    nothing = await write(engine, StepRequest(after("a"), 40, time_limit_s=0.0))
    # Far more tokens than this model writes in that time.
    part = await write(engine, StepRequest(after("a"), 3500, time_limit_s=0.3))

    assert (nothing.text, nothing.stop_reason) == ("", StopReason.DEADLINE)
    assert nothing.token_count == 0
    assert part.stop_reason is StopReason.DEADLINE
    assert 0 < part.token_count < 3500


async def test_deltas_join_to_the_text_and_never_hold_half_a_character(
    start: Start, tmp_path: Path
) -> None:
    engine = start(await reciting(tmp_path, ("Q", "a", "€", "\n", "é", ".\n\n"), (".\n\n",)))

    deltas, step = await watch(engine, StepRequest(after("Q"), 20, stream_text=True))

    assert deltas == ["a", "€", "\né", "."]
    assert step.text == "a€\né."


async def test_streaming_does_not_change_the_step(start: Start, loaded: LoadedModel) -> None:
    engine = start(loaded)
    for number in range(4):
        request = StepRequest(walk(number, 2), 40)
        silent = await write(engine, request)
        deltas, watched = await watch(engine, replace(request, stream_text=True))

        assert "".join(deltas) == watched.text == silent.text
        assert watched.token_count == silent.token_count


async def test_first_token_entropy_is_the_mean_over_the_first_distributions(
    start: Start, loaded: LoadedModel, stock: PreTrainedModel
) -> None:
    trajectory = walk(1, 2)
    step = await write(start(loaded), StepRequest(trajectory, 3, entropy_token_count=3))

    ids = prompt_ids(loaded, trajectory)
    entropies = []
    for _ in range(3):
        with torch.inference_mode():
            shares = stock(torch.tensor([ids])).logits[0, -1].softmax(-1).tolist()
        entropies.append(-math.fsum(share * math.log(share) for share in shares if share))
        ids.append(max(range(len(shares)), key=shares.__getitem__))
    assert step.first_token_entropy == pytest.approx(math.fsum(entropies) / 3, abs=1e-5)


async def test_entropy_is_absent_unless_asked_for(start: Start, loaded: LoadedModel) -> None:
    step = await write(start(loaded), StepRequest(walk(0, 0), 3))

    assert step.first_token_entropy is None


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=7),
        Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=7),
    ],
)
async def test_a_seed_draws_alike_alone_and_among_others(
    start: Start, loaded: LoadedModel, sampling: Sampling
) -> None:
    requests = [StepRequest(walk(n, n % 3), 30, replace(sampling, seed=n)) for n in range(8)]
    alone = [await write(start(loaded), request) for request in requests]

    engine = start(loaded)
    together = await asyncio.gather(*(write(engine, request) for request in requests))

    assert [step.text for step in together] == [step.text for step in alone]


async def test_another_seed_or_step_draws_otherwise(start: Start, loaded: LoadedModel) -> None:
    engine = start(loaded)
    seeds = (1, 2, 1, *[None] * 8)
    texts = [
        (await write(engine, StepRequest(walk(0, 0), 30, Sampling(1.0, seed=seed)))).text
        for seed in seeds
    ]

    assert texts[0] == texts[2] != texts[1]
    # Chance may draw a short step twice, but not eight times.
    assert len(set(texts[3:])) > 1


async def test_top_k_of_one_is_greedy(start: Start, loaded: LoadedModel) -> None:
    engine = start(loaded)
    greedy = await write(engine, StepRequest(walk(3, 1), 30))
    drawn = await write(engine, StepRequest(walk(3, 1), 30, Sampling(5.0, top_k=1)))
    nucleus = await write(engine, StepRequest(walk(3, 1), 30, Sampling(5.0, top_p=1e-9)))

    assert greedy.text == drawn.text == nucleus.text


async def test_a_tokenizer_that_adds_a_start_token_gets_one(start: Start, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(adds_start=True)
    reference = save(tmp_path, random_model(), tokenizer)
    loaded = await asyncio.to_thread(load_model, reference, ModelKind.CAUSAL_LM)

    step = await write(start(loaded), StepRequest(Trajectory("ab"), 2))

    assert loaded.tokenizer.start_ids == (tokenizer.bos_token_id,)
    assert step.prefill_token_count == len("ab\n") + 1


async def test_warming_up_leaves_the_engine_ready(start: Start, loaded: LoadedModel) -> None:
    engine = start(loaded)
    await engine.warm_up()

    assert engine.stats().decoded_token_count > 0
    assert engine.identity.model_id == "random"
