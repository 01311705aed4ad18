"""The pack's tokenizer: lossless on any text, one token per name, phrase and digit.

It is a byte-level BPE without merges, so all 256 bytes are tokens and every text round-trips, plus
plain added tokens for names and for phrases that carry their own spaces. A name is then the same
token wherever it stands, without which models of this size fail to copy names.
"""

import json
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model_packs.tiny.domain import ITEMS, NAMES, SEPARATOR

PAD: Final = "<|pad|>"
END: Final = "<|end|>"
PHRASES: Final = (
    *(SEPARATOR, ": ", "; ", ". ", " + ", " - ", " * ", " / ", " = ", " has ", " owns "),
    *(" more than ", " fewer than ", " times as many as ", "half as many as ", "as many as "),
    *(" and ", " together", " have?", "The answer is \\boxed{", "}.", "Model "),
    *(f"How many {item} does " for item in ITEMS),
)
CONTEXT_TOKENS: Final = 4096


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer; it adds no token of its own to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={PAD: 0, END: 1} | {c: i + 2 for i, c in enumerate(alphabet)}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([PAD, END])
    core.add_tokens([AddedToken(text, normalized=False) for text in (*NAMES, *PHRASES)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # untyped upstream
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        add_bos_token=False,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=CONTEXT_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(folder: Path) -> None:
    """Writes the tokenizer's files into a model folder."""
    build_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    path.write_text(json.dumps(config, indent=2) + "\n")
