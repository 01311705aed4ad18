"""A router may be an encoder: it says what the stock model says, one sequence at a time."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from arbitrage.core.errors import ContextTooLong, Internal, NotServing, Overloaded
from arbitrage.core.steps import Source, Step, Trajectory
from services.engines.encoder import EncoderModel
from services.engines.loading import LoadedModel, ModelKind, ModelLoadError, load_model
from services.engines.scheduler import EngineOptions
from services.engines.transformers_scorers import TransformersRouter
from tests.services.engine_models import byte_tokenizer, random_encoder, save, until
from tests.services.test_engines_router_format import GOOD

_CONTEXT = 96
_STEPS = tuple(Step(f"Then there are {n} left.", Source.DRAFT) for n in range(5))

Start = Callable[..., Awaitable[TransformersRouter]]


@pytest.fixture(scope="module")
def encoder() -> PreTrainedModel:
    return random_encoder(context=_CONTEXT)


@pytest.fixture(scope="module")
def loaded(encoder: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("encoder")
    reference = save(folder, encoder, byte_tokenizer(adds_start=True, model_max_length=_CONTEXT))
    (folder / "router.json").write_text(json.dumps(GOOD))
    return load_model(reference, ModelKind.SEQUENCE_CLASSIFICATION)


@pytest.fixture
async def start(loaded: LoadedModel) -> AsyncIterator[Start]:
    engines: list[TransformersRouter] = []

    async def start_one(**options: int) -> TransformersRouter:
        engines.append(
            await asyncio.to_thread(TransformersRouter, loaded, EngineOptions(**options))
        )
        return engines[-1]

    yield start_one
    for engine in engines:
        await engine.close()


class Gate:
    """Holds every forward of an encoder until it is opened."""

    def __init__(self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        assert isinstance(loaded.model, EncoderModel)
        self.opened = threading.Event()
        forward = loaded.model.model.forward

        def held(*args: Any, **kwargs: Any) -> Any:
            assert self.opened.wait(30)
            return forward(*args, **kwargs)

        monkeypatch.setattr(loaded.model.model, "forward", held)


def ids(text: str) -> list[int]:
    found: list[int] = byte_tokenizer().encode(text, add_special_tokens=False)
    return found


@torch.inference_mode()
def stock(encoder: PreTrainedModel, tokens: list[int]) -> float:
    return float(encoder(torch.tensor([tokens])).logits[0].softmax(-1)[1])


async def test_an_advantage_is_that_of_the_stock_model_from_its_first_token_on(
    start: Start, encoder: PreTrainedModel
) -> None:
    engine = await start()
    advantage = await engine.estimate_advantage(Trajectory("1?", _STEPS[:1]), "abc")
    text = f"1?\nModel 0: {_STEPS[0].text}\n\nModel 0: abc\n\n"
    assert advantage.score.value == pytest.approx(stock(encoder, [1, *ids(text)]), abs=1e-5)
    assert advantage.score.prefill_token_count == len(ids(text)) + 1


async def test_history_is_cut_to_the_length_that_its_tokenizer_names(start: Start) -> None:
    engine = await start()
    assert engine.max_context_tokens == _CONTEXT
    advantage = await engine.estimate_advantage(Trajectory("1?", _STEPS), "abc")
    assert advantage.truncated_token_count > 0
    assert advantage.score.prefill_token_count == _CONTEXT
    with pytest.raises(ContextTooLong, match="candidate tokens"):
        await engine.estimate_advantage(Trajectory("1?"), "x" * _CONTEXT)


async def test_a_full_queue_refuses_and_cancelled_calls_make_room(
    start: Start, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = await start(max_batch=1, max_queue=1), Gate(loaded, monkeypatch)
    calls = [
        asyncio.create_task(engine.estimate_advantage(Trajectory("1?"), "abc")) for _ in range(2)
    ]
    await until(lambda: engine.stats().queued_requests == 1)
    with pytest.raises(Overloaded):
        await engine.estimate_advantage(Trajectory("1?"), "abc")
    calls[1].cancel()
    await asyncio.gather(calls[1], return_exceptions=True)
    third = asyncio.create_task(engine.estimate_advantage(Trajectory("1?"), "abc"))
    await until(lambda: engine.stats().queued_requests == 1)
    gate.opened.set()
    first, last = await asyncio.gather(calls[0], third)
    assert first.score.value == last.score.value
    assert engine.stats().running_requests == 0


async def test_closing_ends_what_waits_and_lets_what_runs_end(
    start: Start, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = await start(), Gate(loaded, monkeypatch)
    calls = [
        asyncio.create_task(engine.estimate_advantage(Trajectory("1?"), "abc")) for _ in range(2)
    ]
    await until(lambda: engine.stats().queued_requests == 1)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    gate.opened.set()
    await closing
    first, second = await asyncio.gather(*calls, return_exceptions=True)
    assert not isinstance(first, BaseException)
    assert isinstance(second, NotServing)
    with pytest.raises(NotServing):
        await engine.estimate_advantage(Trajectory("1?"), "abc")


async def test_a_failed_forward_is_internal_and_says_nothing_of_the_prompt(
    start: Start,
    loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, secret = await start(), "what someone asked"
    assert isinstance(loaded.model, EncoderModel)

    def fail(**_inputs: Any) -> None:
        raise RuntimeError(secret)

    monkeypatch.setattr(loaded.model.model, "forward", fail)
    with pytest.raises(Internal):
        await engine.estimate_advantage(Trajectory("1?"), "abc")
    assert "a forward failed (RuntimeError)" in caplog.text
    assert secret not in caplog.text


def test_an_encoder_is_no_reward_model(tmp_path: Path, encoder: PreTrainedModel) -> None:
    with pytest.raises(ModelLoadError):
        load_model(save(tmp_path, encoder), ModelKind.TOKEN_CLASSIFICATION)
