"""A PRM on a real vLLM scores as it does in this process, and another model is refused."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForTokenClassification

from arbitrage.core.errors import ContextTooLong
from arbitrage.core.steps import Source, Step
from services.engines.loading import LoadOptions, load_model
from services.engines.prm_families import QWEN_MATH, find_family
from services.engines.router_format import TRL_FAMILY
from services.engines.transformers_scorers import TransformersPrm
from services.engines.vllm_prm import SERVED_FAMILIES
from services.prm.remote import running_vllm_prm
from services.prm.settings import PrmSettings
from services.rpc.program import StartError
from services.rpc.telemetry import Telemetry
from tests.engines import servers
from tests.engines.servers import PRM_CONTEXT_TOKENS, PRM_NAME, EngineProcess
from tests.services.engine_models import VOCABULARY_SIZE, byte_tokenizer, save
from tests.services.test_prm_families import PROBLEM, STEPS, chat_tokenizer, drawn, with_heads

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

# Both compute in float32, and add up in another order.
_ROUNDING = 1e-4
_WIDTH = 128
_WRITTEN = tuple(Step(text, Source.DRAFT) for text in STEPS)


@dataclass(frozen=True)
class Served:
    """A checkpoint, and the server that runs it."""

    family: str
    folder: Path
    process: EngineProcess


def config() -> Qwen2Config:
    """Returns a small model's, with heads of a width that vLLM's attention takes."""
    untyped: Any = Qwen2Config
    made = untyped(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=PRM_CONTEXT_TOKENS,
        initializer_range=0.1,
        eos_token_id=0,
        bos_token_id=1,
        num_labels=2,
        tie_word_embeddings=False,
    )
    assert isinstance(made, Qwen2Config)
    return made


def write_trl(folder: Path) -> None:
    torch.manual_seed(0)
    untyped: Any = Qwen2ForTokenClassification
    model = untyped(config())
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.normal_(0.0, 0.2)
    save(folder, model, byte_tokenizer())


def write_qwen_math(folder: Path) -> None:
    torch.manual_seed(0)
    untyped: Any = Qwen2ForCausalLM
    save(folder, untyped(config()), chat_tokenizer())
    heads = {
        "score.0.weight": drawn(_WIDTH, _WIDTH) / 2,
        "score.0.bias": drawn(_WIDTH),
        "score.2.weight": drawn(2, _WIDTH) / 4,
        "score.2.bias": drawn(2),
    }
    with_heads(folder, "Qwen2ForProcessRewardModel", **heads)


_WRITERS = {TRL_FAMILY: write_trl, QWEN_MATH: write_qwen_math}


@contextmanager
def serving(family: str, folder: Path, options: str) -> Iterator[Served]:
    _WRITERS[family](folder)
    with servers.vllm_prm(folder, *shlex.split(options)) as process:
        yield Served(family, folder, process)


@pytest.fixture(scope="module", params=SERVED_FAMILIES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Serves each family with the options that our messages name."""
    folder = tmp_path_factory.mktemp("prm")
    with serving(request.param, folder, SERVED_FAMILIES[request.param]) as found:
        yield found


def settings(served: Served, **fields: Any) -> PrmSettings:
    """Returns what the service is told of a server that is busy with other tests, too."""
    given: dict[str, Any] = {"model": PRM_NAME, "engine": "vllm"}
    given["engine_url"] = served.process.url
    given |= {"engine_tokenizer": str(served.folder), "engine_timeout_s": 400.0}
    return PrmSettings(**{**given, **fields})


async def scores_in_process(folder: Path) -> tuple[float, ...]:
    def load() -> TransformersPrm:
        reference = str(folder)
        options = LoadOptions(dtype="float32")
        return TransformersPrm(
            load_model(reference, lambda found: find_family(found, reference).kind, options)
        )

    engine = await asyncio.to_thread(load)
    try:
        return (await engine.score_steps(PROBLEM, _WRITTEN)).values
    finally:
        await engine.close()


async def test_a_prm_on_vllm_scores_as_it_does_in_this_process(served: Served) -> None:
    expected = await scores_in_process(served.folder)
    # Were they all alike, any place would do.
    assert max(expected) - min(expected) > 0.01
    async with running_vllm_prm(settings(served), Telemetry()) as engine:
        assert engine.family == served.family
        assert engine.max_context_tokens == PRM_CONTEXT_TOKENS
        found = await engine.score_steps(PROBLEM, _WRITTEN)
        assert found.values == pytest.approx(expected, abs=_ROUNDING)
        # With a prefix that the server has read before, too.
        last = await engine.score_steps(PROBLEM, _WRITTEN, 2)
        assert last.values == pytest.approx(expected[2:], abs=_ROUNDING)
        at_once = await asyncio.gather(
            *(engine.score_steps(PROBLEM, _WRITTEN[:count]) for count in (1, 2, 3))
        )
        for count, several in enumerate(at_once, 1):
            assert several.values == pytest.approx(expected[:count], abs=_ROUNDING)


async def test_a_sequence_may_fill_the_context_and_no_more(served: Served) -> None:
    async with running_vllm_prm(settings(served), Telemetry()) as engine:
        empty = await engine.score_steps("8", (Step("8", Source.DRAFT),))
        text = "8" * (PRM_CONTEXT_TOKENS - empty.prefill_token_count + 1)
        full = await engine.score_steps("8", (Step(text, Source.DRAFT),))
        assert full.prefill_token_count == PRM_CONTEXT_TOKENS
        with pytest.raises(ContextTooLong):
            await engine.score_steps("8", (Step(text + "8", Source.DRAFT),))


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        # Its own default reads one id alone, wherever that stands.
        (QWEN_MATH, "--runner pooling", "got 0 rows; serve a checkpoint of qwen2.5-math-prm with"),
        (TRL_FAMILY, "--runner pooling --pooler-config.task classify", "no pooling: .*task"),
    ],
)
async def test_another_head_is_refused_with_the_options_that_would_do(
    tmp_path: Path, family: str, options: str, said: str
) -> None:
    with (
        serving(family, tmp_path, options) as served,
        pytest.raises(StartError, match=f"^ARBITRAGE_ENGINE_URL: .*{said}"),
    ):
        async with running_vllm_prm(settings(served), Telemetry()):
            pass
