"""Each family of PRMs reads ids, positions and scores as its own code does, written out here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from arbitrage.core.errors import ContextTooLong
from arbitrage.core.steps import Source, Step
from services.engines.loading import ModelLoadError, load_model
from services.engines.prm_families import FAMILIES, find_family
from services.engines.transformers_scorers import TransformersPrm
from tests.services.engine_models import (
    START,
    byte_tokenizer,
    random_classifier,
    random_model,
    save,
    wrap_tokenizer,
)

_ROUNDING = 1e-5
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PROBLEM = "Ann has 14 ки and <extra_0>."
# What closes a step stands inside steps, too.
STEPS = ("14 + 8 = 22.", "so\n\nит ки\nis", "<extra_0> 22 ки +")

Started = Callable[..., Awaitable[TransformersPrm]]


@pytest.fixture
async def started() -> AsyncIterator[Started]:
    engines: list[TransformersPrm] = []

    async def start(folder: Path, family: str | None = None) -> TransformersPrm:
        def load() -> TransformersPrm:
            loaded = load_model(
                str(folder), lambda found: find_family(found, str(folder), family).kind
            )
            return TransformersPrm(loaded, family=family)

        engines.append(await asyncio.to_thread(load))
        return engines[-1]

    yield start
    for engine in engines:
        await engine.close()


def with_heads(folder: Path, architecture: str, **tensors: Tensor) -> Path:
    """Puts tensors beside a saved model's, without its language head, and names its class."""
    path = folder / "model.safetensors"
    weights = {k: v for k, v in load_file(path).items() if k != "lm_head.weight"}
    save_file({**weights, **tensors}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)) * 0.4


async def scores(engine: TransformersPrm, steps: tuple[str, ...] = STEPS) -> tuple[float, ...]:
    written = tuple(Step(text, Source.DRAFT) for text in steps)
    return (await engine.score_steps(PROBLEM, written)).values


def hidden(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model.model(torch.tensor([ids])).last_hidden_state[0]  # type: ignore[no-any-return]


async def test_skywork_reads_a_value_at_the_line_end_behind_each_step(
    tmp_path: Path, started: Started
) -> None:
    model, tokenizer = random_model("qwen2"), byte_tokenizer((), adds_start=True)
    save(tmp_path, model, tokenizer)
    weight, bias = drawn(1, 32), drawn(1)
    heads = {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    engine = await started(with_heads(tmp_path, "Qwen2ForPrmModel", **heads))
    assert engine.family == "skywork-o1-open-prm"

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    ids, positions = encode(f"{START}{PROBLEM}\n"), []
    for step in STEPS:
        ids += [*encode(step), encode("\n")[-1]]
        positions.append(len(ids) - 1)
    values = torch.sigmoid(hidden(model, ids)[positions] @ weight.T + bias)[:, 0]
    assert await scores(engine) == pytest.approx(values.tolist(), abs=_ROUNDING)
    laid_out = await engine._layout.lay_out(PROBLEM, STEPS)
    assert (laid_out.tokens, laid_out.positions) == (ids, positions)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    marks = ("<extra_0>", "<|im_start|>", "<|im_end|>")
    tokenizer = byte_tokenizer(marks)
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen_heads() -> dict[str, Tensor]:
    return {
        "score.0.weight": drawn(32, 32),
        "score.0.bias": drawn(32),
        "score.2.weight": drawn(2, 32),
        "score.2.bias": drawn(2),
    }


async def test_qwen_math_reads_two_labels_at_the_mark_behind_each_step_of_a_chat(
    tmp_path: Path, started: Started
) -> None:
    model, tokenizer, heads = random_model("qwen2"), chat_tokenizer(), qwen_heads()
    save(tmp_path, model, tokenizer)
    engine = await started(with_heads(tmp_path, "Qwen2ForProcessRewardModel", **heads))
    assert engine.family == "qwen2.5-math-prm"
    turns = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": PROBLEM},
        {"role": "assistant", "content": "<extra_0>".join(STEPS) + "<extra_0>"},
    ]
    ids = list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))
    mark = tokenizer.convert_tokens_to_ids("<extra_0>")
    marks = [place for place, token in enumerate(ids) if token == mark]
    # One stands in the problem and one at the start of the third step: those close no step.
    assert len(marks) == 5
    positions = [marks[1], marks[2], marks[4]]
    inner = torch.relu(
        hidden(model, ids)[positions] @ heads["score.0.weight"].T + heads["score.0.bias"]
    )
    logits = inner @ heads["score.2.weight"].T + heads["score.2.bias"]
    assert await scores(engine) == pytest.approx(logits.softmax(-1)[:, 1].tolist(), abs=_ROUNDING)
    laid_out = await engine._layout.lay_out(PROBLEM, STEPS)
    assert laid_out.positions == positions
    # What the chat has after its last step, no step is judged by.
    assert laid_out.tokens == ids[: positions[-1] + 1]


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer that puts a space before every text, as that of Mistral does."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    text = "".join(map(chr, range(32, 127))) + "\nитки"
    core.train_from_iterator([text, *["14 + 8 = 22 - 3. ки + - ки"] * 50], trainer)
    core.add_tokens([AddedToken("\n", normalized=False)])
    return wrap_tokenizer(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


async def test_math_shepherd_reads_plus_over_minus_at_the_mark_that_ends_each_line(
    tmp_path: Path, started: Started
) -> None:
    tokenizer = spaced_tokenizer()
    torch.manual_seed(0)
    model: Any = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            initializer_range=0.4, sliding_window=128, tie_word_embeddings=False,
        )
    )  # fmt: skip
    folder = tmp_path / "math-shepherd-little"
    save(folder, model.train(False), tokenizer)
    engine = await started(folder)
    assert engine.family == "math-shepherd"
    # Beyond its window the model's attention would be another.
    assert engine.max_context_tokens == 128
    text = f"{PROBLEM} " + "\n".join(f"{step} ки" for step in STEPS)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    assert tokenizer.convert_tokens_to_ids("▁ки") in ids
    ends = [end for _, end in encoded["offset_mapping"]]
    closing = [len(f"{PROBLEM} " + "\n".join(f"{s} ки" for s in STEPS[:n])) for n in (1, 2, 3)]
    positions = [ends.index(end) for end in closing]
    labels = [tokenizer.convert_tokens_to_ids(f"▁{label}") for label in "+-"]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0][positions][:, labels]
    assert await scores(engine) == pytest.approx(logits.softmax(-1)[:, 0].tolist(), abs=_ROUNDING)
    laid_out = await engine._layout.lay_out(PROBLEM, STEPS)
    assert (laid_out.tokens, laid_out.positions) == (ids, positions)
    with pytest.raises(ContextTooLong):
        await scores(engine, ("8 " * 200,))


async def test_trls_is_told_by_its_class_and_a_longer_sequence_scores_the_same(
    tmp_path: Path, started: Started
) -> None:
    save(tmp_path, random_classifier("token", 2))
    engine = await started(tmp_path)
    assert engine.family == "trl-token-classification"
    both = await scores(engine)
    assert await scores(engine, STEPS[:1]) == pytest.approx(both[:1], abs=_ROUNDING)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "math-shepherd"])
async def test_a_head_that_is_not_where_its_family_keeps_it_is_refused(
    tmp_path: Path, started: Started, family: str
) -> None:
    save(tmp_path, random_model("qwen2"), chat_tokenizer())
    with pytest.raises(ModelLoadError, match=r"has no (weights for |v_head|score)"):
        await started(tmp_path, family)


async def test_another_familys_head_is_not_passed_over_for_the_language_models(
    tmp_path: Path, started: Started
) -> None:
    save(tmp_path, random_classifier("token", 2))
    with pytest.raises(ModelLoadError, match=r"score\.\w+, the head of another family than math-"):
        await started(tmp_path, "math-shepherd")


async def test_a_checkpoint_of_no_family_is_refused_with_those_that_are_known(
    tmp_path: Path, started: Started
) -> None:
    save(tmp_path, random_model("llama"))
    with pytest.raises(ModelLoadError) as raised:
        await started(tmp_path)
    assert "(LlamaForCausalLM) and weights are of no known family" in str(raised.value)
    assert "set ARBITRAGE_PRM_FAMILY to one of skywork-o1-open-prm, " in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score.2.weight": drawn(3, 32), "score.2.bias": drawn(3)}, "gives 3 logits"),
        ({"score.0.weight": drawn(16, 8), "score.2.weight": drawn(2, 16)}, "reads 8 values"),
        ({"score.2.weight": drawn(2, 16)}, "reads 16 values, but is given 32"),
    ],
)
async def test_a_head_of_another_width_is_refused(
    tmp_path: Path, started: Started, changes: dict[str, Tensor], said: str
) -> None:
    save(tmp_path, random_model("qwen2"), chat_tokenizer())
    with_heads(tmp_path, "Qwen2ForProcessRewardModel", **{**qwen_heads(), **changes})
    with pytest.raises(ModelLoadError, match=said):
        await started(tmp_path)


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (byte_tokenizer(()), "no single token for '<extra_0>'"),
        (byte_tokenizer(("<extra_0>",)), "no chat template"),
    ],
)
async def test_a_tokenizer_without_what_the_family_reads_is_refused(
    tmp_path: Path, started: Started, tokenizer: PreTrainedTokenizerFast, said: str
) -> None:
    save(tmp_path, random_model("qwen2"), tokenizer)
    with_heads(tmp_path, "Qwen2ForProcessRewardModel", **qwen_heads())
    with pytest.raises(ModelLoadError, match=said):
        await started(tmp_path)


async def test_steps_known_from_before_are_not_computed_again(
    tmp_path: Path, started: Started
) -> None:
    save(tmp_path, random_model("qwen2"), chat_tokenizer())
    engine = await started(with_heads(tmp_path, "Qwen2ForProcessRewardModel", **qwen_heads()))
    written = tuple(Step(text, Source.DRAFT) for text in STEPS)
    first = await engine.score_steps(PROBLEM, written[:2])
    whole = await engine.score_steps(PROBLEM, written, 2)
    assert whole.cached_token_count == first.prefill_token_count
    assert len(whole.values) == 1
