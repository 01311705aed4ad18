"""A model is loaded whole and known by its contents, or refused with what is wrong and the fix."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GeneratedStep, Trajectory
from services.engines import loading
from services.engines.loading import (
    LoadedModel,
    LoadOptions,
    ModelKind,
    ModelLoadError,
    hub_patterns,
    load_model,
)
from services.engines.transformers_generator import TransformersGenerator
from tests.services.engine_models import (
    byte_tokenizer,
    random_classifier,
    random_model,
    save,
    wrap_tokenizer,
)


def test_a_folder_is_known_by_its_contents(tmp_path: Path) -> None:
    first = load_model(save(tmp_path / "first", random_model()), ModelKind.CAUSAL_LM)
    same = load_model(save(tmp_path / "same", random_model()), ModelKind.CAUSAL_LM)
    other = load_model(save(tmp_path / "other", random_model(seed=1)), ModelKind.CAUSAL_LM)
    named = load_model(str(tmp_path / "same"), ModelKind.CAUSAL_LM, model_id="tiny/draft")

    assert first.identity.revision == same.identity.revision != other.identity.revision
    assert len(first.identity.revision) == 16
    assert (first.identity.model_id, named.identity.model_id) == ("first", "tiny/draft")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "router.json", "new.jinja"]
)
def test_a_change_to_any_file_that_answers_depend_on_changes_the_revision(
    tmp_path: Path, name: str
) -> None:
    reference = save(tmp_path, random_model())
    path = tmp_path / name
    path.write_text(path.read_text() if path.exists() else "{}")
    before = load_model(reference, ModelKind.CAUSAL_LM).identity.revision

    path.write_text(path.read_text() + "\n")

    assert load_model(reference, ModelKind.CAUSAL_LM).identity.revision != before


def test_a_file_that_answers_do_not_depend_on_leaves_the_revision(tmp_path: Path) -> None:
    reference = save(tmp_path, random_model())
    before = load_model(reference, ModelKind.CAUSAL_LM).identity.revision

    (tmp_path / "README.md").write_text("A model")
    (tmp_path / "more.json").mkdir()

    assert load_model(reference, ModelKind.CAUSAL_LM).identity.revision == before


def test_another_dtype_is_another_revision(tmp_path: Path) -> None:
    reference = save(tmp_path, random_model())

    revisions = [
        load_model(reference, ModelKind.CAUSAL_LM, LoadOptions(dtype=dtype)).identity.revision
        for dtype in (None, "float32", "bfloat16")
    ]

    assert revisions[0] == revisions[1] != revisions[2]


def test_a_model_of_the_hub_is_known_by_its_commit_and_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "0123abc"  # as the hub's cache names a snapshot: by its commit
    save(snapshot, random_model())
    monkeypatch.setattr(loading, "snapshot_download", lambda *_, **__: str(snapshot))

    revisions = [
        load_model("org/name@main", ModelKind.CAUSAL_LM, LoadOptions(dtype=dtype)).identity.revision
        for dtype in (None, "bfloat16")
    ]

    assert revisions == ["0123abc-float32", "0123abc-bfloat16"]


def test_code_is_fetched_and_known_only_where_it_may_run(tmp_path: Path) -> None:
    reference = save(tmp_path, random_model())
    trusting = LoadOptions(trust_remote_code=True)
    before = [
        load_model(reference, ModelKind.CAUSAL_LM, options).identity.revision
        for options in (LoadOptions(), trusting)
    ]

    (tmp_path / "modeling.py").write_text("pass")

    after = [
        load_model(reference, ModelKind.CAUSAL_LM, options).identity.revision
        for options in (LoadOptions(), trusting)
    ]
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    assert "*.py" not in hub_patterns(LoadOptions())
    assert "*.py" in hub_patterns(trusting)


def test_end_tokens_come_from_generation_config_and_tokenizer(tmp_path: Path) -> None:
    model = random_model()
    model.generation_config.eos_token_id = [5, 7]
    loaded = load_model(save(tmp_path, model), ModelKind.CAUSAL_LM)

    assert loaded.end_ids == {0, 5, 7}


def test_weights_are_held_in_the_dtype_asked_for(tmp_path: Path) -> None:
    reference = save(tmp_path, random_model())

    default = load_model(reference, ModelKind.CAUSAL_LM)
    half = load_model(reference, ModelKind.CAUSAL_LM, LoadOptions(dtype="bfloat16"))

    assert default.packed.kv_shape.dtype is torch.float32
    assert half.packed.kv_shape.dtype is torch.bfloat16
    assert half.packed.kv_shape.bytes_per_token * 2 == default.packed.kv_shape.bytes_per_token


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such folder; give a folder"):
        load_model(str(tmp_path / "nowhere"), ModelKind.CAUSAL_LM)
    with pytest.raises(ModelLoadError, match="no such file"):
        load_model(str(tmp_path / "nowhere.gguf"), ModelKind.CAUSAL_LM)


def test_a_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load_model(str(tmp_path), ModelKind.CAUSAL_LM)
    random_model().config.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"no \*\.safetensors file"):
        load_model(str(tmp_path), ModelKind.CAUSAL_LM)


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    model = random_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")

    with pytest.raises(ModelLoadError, match=r"a pickle \(pytorch_model\.bin\).*safetensors"):
        load_model(str(tmp_path), ModelKind.CAUSAL_LM)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    reference = save(tmp_path, random_model())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])

    with pytest.raises(ModelLoadError, match="weight file is damaged"):
        load_model(reference, ModelKind.CAUSAL_LM)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    reference = save(tmp_path, random_model())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "abacus"}))

    with pytest.raises(ModelLoadError, match="AutoModelForCausalLM"):
        load_model(reference, ModelKind.CAUSAL_LM)


@pytest.mark.parametrize(
    "reference", ["n" * 300, "~nobody-of-that-name/x", "a\0b", "two\nlines", "\ud800", "a\0b.gguf"]
)
def test_a_reference_that_no_file_can_have_is_refused(reference: str) -> None:
    with pytest.raises(ModelLoadError, match="no such") as raised:
        load_model(reference, ModelKind.CAUSAL_LM)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "7"),  # transformers raises AttributeError
        ("tokenizer.json", '{"truncation": "no"}'),  # tokenizers raises a bare Exception
        ("tokenizer_config.json", "[]"),
        ("config.json", "[" * 100_000),
        ("config.json", '{"model_type": "llama", "hidden_size": true}'),
        ("config.json", '{"model_type": "llama", "num_hidden_layers": 2, "architectures": [1]}'),
    ],
)
def test_whatever_a_damaged_file_breaks_the_model_is_refused(
    tmp_path: Path, name: str, content: str
) -> None:
    reference = save(tmp_path, random_model())
    (tmp_path / name).write_text(content)

    with pytest.raises(ModelLoadError, match="check the folder's files") as raised:
        load_model(reference, ModelKind.CAUSAL_LM)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1_500


def test_a_config_with_more_layers_than_weights_is_refused_before_they_are_made(
    tmp_path: Path,
) -> None:
    reference = save(tmp_path, random_model())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2**31}))

    with pytest.raises(ModelLoadError, match="num_hidden_layers 2147483648, but the weights are"):
        load_model(reference, ModelKind.CAUSAL_LM)


def test_a_checkpoint_without_the_head_is_refused(tmp_path: Path) -> None:
    reference = save(tmp_path, random_model())

    with pytest.raises(ModelLoadError, match=r"no weights for score\.weight"):
        load_model(reference, ModelKind.SEQUENCE_CLASSIFICATION)
    with pytest.raises(ModelLoadError, match=r"no weights for score\."):
        load_model(reference, ModelKind.TOKEN_CLASSIFICATION)


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    reference = save(tmp_path, random_classifier("sequence", 2))

    with pytest.raises(ModelLoadError, match=r"no weights for lm_head\.weight"):
        load_model(reference, ModelKind.CAUSAL_LM)


@pytest.mark.parametrize("names_its_class", [True, False])
def test_a_classifier_with_tied_embeddings_is_no_language_model(
    tmp_path: Path, *, names_its_class: bool
) -> None:
    reference = save(tmp_path, random_classifier("token", 2))
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    if not names_its_class:
        del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))

    found = "LlamaForTokenClassification" if names_its_class else r"score\.bias"
    with pytest.raises(ModelLoadError, match=f"another head.*{found}"):
        load_model(reference, ModelKind.CAUSAL_LM)


def test_a_token_classifier_judges_no_sequence(tmp_path: Path) -> None:
    reference = save(tmp_path, random_classifier("token", 2))

    with pytest.raises(ModelLoadError, match=r"another head.*LlamaForTokenClassification"):
        load_model(reference, ModelKind.SEQUENCE_CLASSIFICATION)


def test_a_tied_head_is_not_missed(tmp_path: Path) -> None:
    config = random_model().config
    assert isinstance(config, LlamaConfig)
    config.tie_word_embeddings = True
    loaded = load_model(save(tmp_path, LlamaForCausalLM(config)), ModelKind.CAUSAL_LM)

    embeddings = loaded.packed.model.get_input_embeddings().weight
    assert loaded.packed.model.lm_head.weight.data_ptr() == embeddings.data_ptr()


def test_a_model_with_a_sliding_window_serves_what_fits_it(tmp_path: Path) -> None:
    reference = save(tmp_path, random_model("mistral"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))

    assert load_model(reference, ModelKind.CAUSAL_LM).packed.max_context_tokens == 16


def test_a_tokenizer_that_cuts_texts_is_kept_from_it(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    loaded = load_model(save(tmp_path, random_model(), tokenizer), ModelKind.CAUSAL_LM)

    assert len(loaded.tokenizer.encode("abcdef")) == 6


def _gguf_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return wrap_tokenizer(core, eos_token=tokens[0])


def _write_gguf(path: Path, model: PreTrainedModel, tokens: list[str]) -> None:
    """Writes a Llama as llama.cpp does: its names, and its order of rows for rotary heads."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(name.split(".")[-2])
        if count is not None:
            halves = values.reshape(count, 2, -1, values.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_and_folder(tmp_path: Path) -> tuple[LoadedModel, LoadedModel]:
    """The same model from a GGUF file and from safetensors."""
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
            eos_token_id=0,
            bos_token_id=None,
        )
    )
    _write_gguf(tmp_path / "small.gguf", model, tokens)
    folder = save(tmp_path / "folder", model, _gguf_tokenizer(tokens))
    return (
        load_model(str(tmp_path / "small.gguf"), ModelKind.CAUSAL_LM),
        load_model(folder, ModelKind.CAUSAL_LM),
    )


async def test_a_gguf_file_writes_what_its_safetensors_write(
    gguf_and_folder: tuple[LoadedModel, LoadedModel],
) -> None:
    steps = []
    for loaded in gguf_and_folder:
        engine = TransformersGenerator(loaded)
        async for item in engine.generate_step(StepRequest(Trajectory("ab and ba"), 40)):
            assert isinstance(item, GeneratedStep)
            steps.append((item.text, item.stop_reason, item.token_count))
        await engine.close()

    assert steps[0] == steps[1]
    assert gguf_and_folder[0].identity.model_id == "small"
