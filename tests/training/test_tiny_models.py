"""What the training scripts promise of the models they grow and of the labels they learn from."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, LlamaForTokenClassification

from model_packs.tiny.corruption import corrupt
from model_packs.tiny.domain import Split, problems
from model_packs.tiny.generation import Encoder
from model_packs.tiny.judge import (
    CODE_WIDTH,
    TOP_LAYER_COUNT,
    frozen_output,
    install_trunk,
    judge_config,
    prepare_top,
)
from model_packs.tiny.language_model import IGNORED, Shape, deepen, model_config
from model_packs.tiny.reward_model import token_labels
from model_packs.tiny.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
ENCODER = Encoder(TOKENIZER)
PROBLEM = next(problems(3, Split.TRAINING))
IDS = torch.tensor([ENCODER.prefix(PROBLEM.text, PROBLEM.steps)])


def language_model(layer_count: int) -> LlamaForCausalLM:
    torch.manual_seed(5)
    return LlamaForCausalLM(model_config(Shape(layer_count, 64, 128), TOKENIZER))


def judge_on(trunk: LlamaForCausalLM, folder: Path) -> LlamaForTokenClassification:
    trunk.save_pretrained(folder)
    config = judge_config(trunk.config)
    judge = LlamaForTokenClassification(config)  # type: ignore[no-untyped-call]  # untyped upstream
    install_trunk(judge, folder)
    prepare_top(judge)
    return judge


def test_a_deepened_model_computes_what_it_did() -> None:
    shallow = language_model(2)
    deep = deepen(shallow, 5)
    assert len(deep.model.layers) == 5
    torch.testing.assert_close(deep(IDS).logits, shallow(IDS).logits)


def test_every_layer_of_a_deepened_model_can_learn() -> None:
    deep = deepen(language_model(2), 5)
    deep(IDS, labels=IDS).loss.backward()
    assert all(layer.mlp.down_proj.weight.grad.abs().sum() > 0 for layer in deep.model.layers)


def test_a_judge_computes_below_its_top_layers_what_its_trunk_does(tmp_path: Path) -> None:
    trunk = language_model(2)
    judge = judge_on(trunk, tmp_path)

    known = trunk(IDS, output_hidden_states=True).hidden_states[1][0]  # before its second layer
    stream = frozen_output(judge, IDS, 1)[0]
    width = trunk.config.hidden_size
    scale = (
        trunk.model.embed_tokens.weight.norm() / judge.model.embed_tokens.weight[:, :width].norm()
    )
    # Not to the last bit: the codes' length, small as it is, counts in the norms.
    assert (stream[:, :width] * scale - known).norm() < 0.02 * known.norm()


def test_a_judge_carries_a_tokens_code_past_its_trunk(tmp_path: Path) -> None:
    trunk = language_model(2)
    judge = judge_on(trunk, tmp_path)

    embedded = judge.model.embed_tokens(IDS)[0, :, -CODE_WIDTH:]
    codes = {tuple(code) for code in embedded.tolist()}
    assert len(codes) == len(set(IDS[0].tolist()))
    assert len({abs(value) for code in codes for value in code}) == 1  # signs alone
    for layer in (1, 2, 2 + TOP_LAYER_COUNT):  # new top layers add nothing yet
        assert torch.equal(frozen_output(judge, IDS, layer)[0, :, -CODE_WIDTH:], embedded)


def test_a_right_solution_is_right_at_every_token() -> None:
    ids, labels = token_labels(ENCODER, PROBLEM, PROBLEM.steps)
    asked = len(ENCODER.ids(f"{PROBLEM.text}\n"))
    assert ids == IDS[0].tolist()
    assert labels == [IGNORED] * asked + [1] * (len(ids) - asked)


def test_a_solution_is_wrong_from_its_first_wrong_token_on() -> None:
    rng = random.Random(7)
    for problem in (p for p, _ in zip(problems(4, Split.TRAINING), range(50), strict=False)):
        right, _ = token_labels(ENCODER, problem, problem.steps)
        ids, labels = token_labels(ENCODER, problem, corrupt(rng, problem))
        first_wrong = next(
            at for at, token in enumerate(ids) if at >= len(right) or token != right[at]
        )
        assert 0 not in labels[:first_wrong]
        assert set(labels[first_wrong:]) == {0}


def test_annotations_are_read_and_not_judged() -> None:
    writers = [index % 2 for index in range(len(PROBLEM.steps))]
    bare_ids, bare = token_labels(ENCODER, PROBLEM, PROBLEM.steps)
    ids, labels = token_labels(ENCODER, PROBLEM, PROBLEM.steps, writers)
    assert len(ids) > len(bare_ids)
    assert [label for label in labels if label != IGNORED] == [
        label for label in bare if label != IGNORED
    ]
