"""Loads a model from a folder, a pinned Hugging Face id or a GGUF file, or says why it cannot.

Weights are data: safetensors or GGUF, never a pickle, and no code comes along unless the operator
asks for it by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arbitrage.core.shown import one_line, shown
from arbitrage.core.steps import ModelIdentity
from services.engines.encoder import EncoderModel, is_encoder
from services.engines.pack_manifest import MODEL_SUFFIXES
from services.engines.packed import PackedModel, UnsupportedModel
from services.engines.tokenization import PieceTokenizer

_HUB_REFERENCE = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
_HEADS = ("ForCausalLM", "ForTokenClassification", "ForSequenceClassification")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

DtypeName = Literal["float32", "bfloat16", "float16"]


class ModelLoadError(Exception):
    """A model cannot be loaded. The message names the reference, what is wrong and the fix."""

    def __init__(self, reference: str, problem: str, fix: str) -> None:
        self.reference = reference
        self.problem = problem
        self.fix = fix
        super().__init__(f"model {shown(reference, 200)}: {problem}; {fix}")


class ModelKind(Enum):
    """What a model's head computes; the value is the class of transformers that has it."""

    CAUSAL_LM = "AutoModelForCausalLM"
    TOKEN_CLASSIFICATION = "AutoModelForTokenClassification"  # noqa: S105 - no password
    SEQUENCE_CLASSIFICATION = "AutoModelForSequenceClassification"
    # No head that transformers knows: whoever asks for it brings one.
    BASE = "AutoModel"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Where and how a model's weights are held.

    `dtype` None takes float32 on the CPU and bfloat16 elsewhere.
    """

    device: str = "cpu"
    dtype: DtypeName | None = None
    trust_remote_code: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        name = self.dtype or ("float32" if self.device == "cpu" else "bfloat16")
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run: a decoder, or an encoder where the kind is a sequence classifier.

    `head` maps a decoder's hidden states [rows, width] to logits [rows, logit_count]; an encoder
    gives logits by itself. `chat_tokenizer` knows the chat template, if there is one; `end_ids` are
    the tokens that end a text; `folder` is where the files lie that describe the model.
    """

    reference: str
    model: PackedModel | EncoderModel
    head: Callable[[Tensor], Tensor]
    logit_count: int
    tokenizer: PieceTokenizer
    chat_tokenizer: PreTrainedTokenizerBase
    bos_id: int | None
    end_ids: frozenset[int]
    identity: ModelIdentity
    folder: Path

    @property
    def packed(self) -> PackedModel:
        """The decoder."""
        assert isinstance(self.model, PackedModel), f"{self.reference} is an encoder"
        return self.model


@dataclass(frozen=True, slots=True)
class _Source:
    folder: Path
    gguf_file: str | None
    identity: ModelIdentity


def load_model(
    reference: str,
    kind: ModelKind | Callable[[Path], ModelKind],
    options: LoadOptions | None = None,
    model_id: str | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Loads the model that `reference` names: a folder, `org/name@revision`, or a `.gguf` file.

    `kind` may be told from the model's folder. `model_id` is the name people see; without it, the
    folder's, the file's or the hub's.
    `revision` is what stands for the files where the caller knows it; without it, their digest.

    Raises:
        ModelLoadError
    """
    options = options or LoadOptions()
    try:
        source = _resolve(reference, model_id, options)
        if revision is not None:
            identity = replace(source.identity, revision=_with_dtype(revision, options))
            source = replace(source, identity=identity)
        if not isinstance(kind, ModelKind):
            kind = kind(source.folder)
        return _load(reference, source, kind, options)
    except ModelLoadError:
        raise
    except UnsupportedModel as error:
        raise ModelLoadError(
            reference, f"{error} is not supported", "use a model with plain causal attention"
        ) from error
    except SafetensorError as error:
        raise ModelLoadError(
            reference,
            f"a weight file is damaged ({one_line(str(error), 400)})",
            "fetch the model again",
        ) from error
    except Exception as error:
        # What transformers and tokenizers raise on files they cannot read has no common class;
        # their words may be a page long.
        said = one_line(f"{type(error).__name__}: {error}", 400)
        as_kind = f" as {kind.value}" if isinstance(kind, ModelKind) else ""
        raise ModelLoadError(
            reference,
            f"it cannot be loaded{as_kind} ({said})",
            "check the folder's files and that the model is of this kind",
        ) from error


def _load(reference: str, source: _Source, kind: ModelKind, options: LoadOptions) -> LoadedModel:
    extra: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if source.gguf_file is not None:
        extra["gguf_file"] = source.gguf_file
    else:
        extra["use_safetensors"] = True
        _refuse_too_many_layers(reference, source.folder, options)
    auto_class = getattr(transformers, kind.value)
    model, report = auto_class.from_pretrained(
        source.folder, dtype=options.torch_dtype, output_loading_info=True, **extra
    )
    _refuse_random_weights(reference, model, report)
    if kind is not ModelKind.BASE:
        _refuse_another_head(reference, model, report, kind)
    extra.pop("use_safetensors", None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **extra)
    model.to(options.device)
    if kind is ModelKind.SEQUENCE_CLASSIFICATION and is_encoder(model):
        ready: PackedModel | EncoderModel = EncoderModel(model, tokenizer.model_max_length)
        head: torch.nn.Module = torch.nn.Identity()
        logit_count = model.config.num_labels
    else:
        ready = PackedModel(model)
        ready.verify()
        head, logit_count = _head(reference, model, kind)
    return LoadedModel(
        reference=reference,
        model=ready,
        head=head,
        logit_count=logit_count,
        tokenizer=PieceTokenizer(tokenizer),
        chat_tokenizer=tokenizer,
        bos_id=tokenizer.bos_token_id,
        end_ids=_end_ids(model, tokenizer),
        identity=source.identity,
        folder=source.folder,
    )


def _refuse_too_many_layers(reference: str, folder: Path, options: LoadOptions) -> None:
    # transformers makes every layer before it looks at the weights: a number too many in a damaged
    # file would take all memory and never end.
    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=options.trust_remote_code
    )
    layer_count = getattr(config, "num_hidden_layers", 0)
    tensor_count = sum(_tensor_count(path) for path in folder.glob("*.safetensors"))
    if layer_count > tensor_count:
        raise ModelLoadError(
            reference,
            f"config.json says num_hidden_layers {layer_count}, but the weights are "
            f"{tensor_count} tensors",
            "fetch the model again",
        )


def _tensor_count(path: Path) -> int:
    with safe_open(path, "pt") as weights:
        return len(weights.keys())


def _refuse_random_weights(reference: str, model: PreTrainedModel, report: Any) -> None:
    # transformers fills what a checkpoint lacks with random numbers and only logs it. A head tied
    # to the embeddings is not among them.
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        raise ModelLoadError(
            reference,
            f"the checkpoint has no weights for {shown}",
            f"use a checkpoint of {type(model).__name__}",
        )


def _refuse_another_head(
    reference: str, model: PreTrainedModel, report: Any, kind: ModelKind
) -> None:
    # With tied embeddings nothing is missing when a classifier is read as a language model: it
    # would start, and write nonsense.
    unread = sorted(key for key in report["unexpected_keys"] if key.startswith("score."))
    own = kind.value.removeprefix("AutoModel")
    named = getattr(model.config, "architectures", None) or ()
    others = [name for name in named if name.endswith(_HEADS) and not name.endswith(own)]
    if not unread and not others:
        return
    found = f"config.json names {others[0]}" if others else f"the checkpoint holds {unread[0]}"
    raise ModelLoadError(
        reference, f"it has another head than {kind.value}: {found}", "give a model of this kind"
    )


def _head(reference: str, model: PreTrainedModel, kind: ModelKind) -> tuple[torch.nn.Module, int]:
    """Returns the head and how many logits it gives; a base model's hidden states pass as such."""
    if kind is ModelKind.BASE:
        return torch.nn.Identity(), model.config.hidden_size
    head = getattr(model, "lm_head" if kind is ModelKind.CAUSAL_LM else "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise ModelLoadError(
            reference,
            f"{type(model).__name__} has no head where its kind keeps it",
            "use a decoder of the Llama, Qwen2 or Mistral kind",
        )
    return head, head.out_features


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    generation_config = getattr(model, "generation_config", None)
    configured = getattr(generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def _resolve(reference: str, model_id: str | None, options: LoadOptions) -> _Source:
    # Not the methods of Path, which raise on what no file system can hold and on unknown users.
    path = Path(os.path.expanduser(reference))
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ModelLoadError(reference, "no such file", "give the path of a .gguf file")
        revision = _digest([path], options)
        return _Source(path.parent, path.name, ModelIdentity(model_id or path.stem, revision))
    if os.path.isdir(path):
        _check_folder(reference, path)
        revision = folder_revision(path, options)
        return _Source(path, None, ModelIdentity(model_id or path.resolve().name, revision))
    match = _HUB_REFERENCE.fullmatch(reference)
    if match is None:
        raise ModelLoadError(
            reference,
            "no such folder",
            "give a folder, a .gguf file, or a Hugging Face id as org/name@revision",
        )
    folder = _fetch(reference, match["name"], match["revision"], options)
    _check_folder(reference, folder)
    # A snapshot's folder is named by the commit that the revision stands for; answers depend on
    # the dtype, too.
    commit = _with_dtype(folder.name, options)
    return _Source(folder, None, ModelIdentity(model_id or match["name"], commit))


def _with_dtype(revision: str, options: LoadOptions) -> str:
    return f"{revision}-{str(options.torch_dtype).removeprefix('torch.')}"


def _suffixes(options: LoadOptions) -> tuple[str, ...]:
    """Returns the suffixes of the files that make up a model; code only where it is wanted."""
    return (*MODEL_SUFFIXES, ".py") if options.trust_remote_code else MODEL_SUFFIXES


def folder_revision(folder: Path, options: LoadOptions) -> str:
    """Returns the revision that a model loaded from `folder` has: a digest of its files.

    Raises:
        OSError: one of them cannot be read.
    """
    suffixes = _suffixes(options)
    files = sorted(p for p in folder.iterdir() if p.suffix in suffixes and not p.is_dir())
    return _digest(files, options)


def hub_patterns(options: LoadOptions) -> list[str]:
    """Returns patterns of the files that are fetched from Hugging Face."""
    return [f"*{suffix}" for suffix in _suffixes(options)]


def _fetch(reference: str, name: str, revision: str, options: LoadOptions) -> Path:
    patterns = hub_patterns(options)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            reference,
            f"it cannot be fetched from Hugging Face ({error})",
            "check the id, the revision, the network and HF_TOKEN",
        ) from error


def _check_folder(reference: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            reference, "the folder has no config.json", "give the folder that holds the model"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelLoadError(
            reference,
            f"its weights are a pickle ({pickles[0]}), which can run code",
            "convert them to safetensors",
        )
    raise ModelLoadError(
        reference, "the folder has no *.safetensors file", "add the weights or fetch them again"
    )


def _digest(files: list[Path], options: LoadOptions) -> str:
    """Returns what stands for everything that an answer depends on: the files and the dtype."""
    digest = sha256(str(options.torch_dtype).encode())
    for path in files:
        with path.open("rb") as stream:
            # No name holds a NUL, so no two lists of files read alike.
            digest.update(b"\0%b\0%d\0" % (os.fsencode(path.name), path.stat().st_size))
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
