"""Requests for the engine tests, and what runs them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from arbitrage.core.ports import Generator, StepRequest
from arbitrage.core.prompts import generator_pieces
from arbitrage.core.steps import GeneratedStep, Source, Step, StopReason, Trajectory
from services.engines.loading import LoadedModel, ModelKind, load_model
from services.engines.scheduler import EngineOptions
from services.engines.transformers_generator import TransformersGenerator
from tests.services.engine_models import byte_tokenizer, reciter, save

_STEP_TEXTS = ("Ann has 3.", "Bob owns 5 more", "so €8", "that is 16.")

Start = Callable[..., TransformersGenerator]


@asynccontextmanager
async def generators() -> AsyncIterator[Start]:
    """Yields what starts generators; they are closed at the end."""
    engines: list[TransformersGenerator] = []

    def start(loaded: LoadedModel, **options: int) -> TransformersGenerator:
        engines.append(TransformersGenerator(loaded, EngineOptions(**options)))
        return engines[-1]

    yield start
    for engine in engines:
        await engine.close()


def load_reciter(
    folder: Path,
    text_tokens: Sequence[str],
    added: Sequence[str] = ("\n\n",),
    *,
    ends: bool = True,
) -> LoadedModel:
    """Loads a model that writes the given tokens, once it has read the first."""
    tokenizer = byte_tokenizer(added)
    token_ids = [
        i for text in text_tokens for i in tokenizer.encode(text, add_special_tokens=False)
    ]
    model = reciter(tokenizer, token_ids, ends=ends)
    return load_model(save(folder, model, tokenizer), ModelKind.CAUSAL_LM)


async def reciting(
    folder: Path, text_tokens: Sequence[str], added: Sequence[str] = ("\n\n",)
) -> LoadedModel:
    """Does the same off the event loop."""
    return await asyncio.to_thread(load_reciter, folder, text_tokens, added)


def after(start_text: str) -> Trajectory:
    """Returns a prefix that ends in `start_text`, with no separator after it."""
    return Trajectory("", (Step(start_text, Source.DRAFT, StopReason.STEP_LENGTH),))


def walk(number: int, step_count: int) -> Trajectory:
    """Returns a problem and some steps, another for each number."""
    texts = [_STEP_TEXTS[(number + i) % len(_STEP_TEXTS)] for i in range(step_count)]
    return Trajectory(f"Problem {number}", tuple(Step(text, Source.DRAFT) for text in texts))


def prompt_ids(loaded: LoadedModel, trajectory: Trajectory) -> list[int]:
    """Returns the ids that a model without a start token reads."""
    return loaded.tokenizer.encode_all(generator_pieces(trajectory))


async def write(engine: Generator, request: StepRequest) -> GeneratedStep:
    """Returns the step, which must be all that comes."""
    deltas, step = await watch(engine, request)
    assert not deltas
    return step


async def watch(engine: Generator, request: StepRequest) -> tuple[list[str], GeneratedStep]:
    """Returns the deltas and the step after them."""
    *deltas, last = [item async for item in engine.generate_step(request)]
    assert isinstance(last, GeneratedStep)
    assert all(isinstance(delta, str) and delta for delta in deltas)
    return [str(delta) for delta in deltas], last
