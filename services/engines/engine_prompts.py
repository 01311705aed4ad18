"""The text a language model is prompted with: plain, or in the turns of its chat template.

Templates are applied here and not by a server, because a step goes on in the middle of an answer:
the steps so far stand in the model's own turn, which stays open.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import transformers
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from arbitrage.core.errors import ContextTooLong, FieldInvalid
from arbitrage.core.prompts import generator_pieces
from arbitrage.core.shown import one_line
from arbitrage.core.steps import ModelIdentity, Trajectory
from services.engines.engine_server import digest_of
from services.engines.loading import ModelLoadError

_HUB_REFERENCE = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
_REMEMBERED_PROBLEMS = 256


class PromptText(Protocol):
    """Writes a prefix as the model is to read it."""

    @property
    def revision_suffix(self) -> str:
        """Names what an answer depends on beside the weights; "" for the plain text."""
        ...

    @property
    def has_start(self) -> bool:
        """Whether the text itself holds the token that begins it, where the model has one."""
        ...

    def pieces(self, trajectory: Trajectory) -> tuple[str, ...]:
        """Returns the pieces, each of them tokenised by itself.

        Raises:
            FieldInvalid: the problem cannot be put into the template.
        """
        ...


def context_too_long(context_tokens: int, prompt_count: str, max_tokens: int) -> ContextTooLong:
    """Returns the error of a prompt of so many tokens that leaves no room for its next step."""
    return ContextTooLong(
        "problem",
        f"{prompt_count} tokens with its steps, and {max_tokens} for the next",
        f"does not fit the context of {context_tokens} tokens",
        "shorten the problem, lower the tokens that a step may have (max_step_tokens), "
        "or use a model with a longer context",
    )


def identity_with(identity: ModelIdentity, prompts: PromptText) -> ModelIdentity:
    """Returns the identity of a model that is prompted so.

    >>> identity_with(ModelIdentity("smollm2", "a1b2"), PlainText())
    ModelIdentity(model_id='smollm2', revision='a1b2')
    """
    return replace(identity, revision=identity.revision + prompts.revision_suffix)


class PlainText:
    """The problem and its steps, with nothing around them."""

    revision_suffix = ""
    has_start = False

    def pieces(self, trajectory: Trajectory) -> tuple[str, ...]:
        """Returns the problem, then each step and its separator."""
        return generator_pieces(trajectory)


class ChatText:
    """The problem as a user's message, and the steps as the start of the model's answer.

    Raises:
        ModelLoadError: the tokenizer has no chat template, or one that cannot be used.
    """

    has_start = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reference: str) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise ModelLoadError(
                reference,
                "its tokenizer has no chat template",
                "set ARBITRAGE_ENGINE_PROMPT=plain, or use a model made for chat",
            )
        self._tokenizer: Any = tokenizer
        self._head = lru_cache(_REMEMBERED_PROBLEMS)(self._render)
        try:
            self._render("1 + 1?")
        except TemplateError as error:
            raise ModelLoadError(
                reference,
                f"its chat template cannot be used ({one_line(str(error), 200)})",
                "mend the template, or set ARBITRAGE_ENGINE_PROMPT=plain",
            ) from error
        self.revision_suffix = f"-chat-{digest_of(tokenizer.chat_template)[:8]}"

    def pieces(self, trajectory: Trajectory) -> tuple[str, ...]:
        """Returns everything up to the model's answer, then each step and its separator."""
        try:
            head = self._head(trajectory.problem)
        except TemplateError as error:
            raise FieldInvalid(
                "problem",
                trajectory.problem,
                f"the model's chat template refuses it ({one_line(str(error), 200)})",
                "ask in another way",
            ) from error
        return (head, *generator_pieces(trajectory)[1:])

    def _render(self, problem: str) -> str:
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": problem}], tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        return text


def load_tokenizer(reference: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that `reference` names: a folder, a `.gguf` file, or `org/name@revision`.

    Raises:
        ModelLoadError
    """
    path = Path(os.path.expanduser(reference))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    match = _HUB_REFERENCE.fullmatch(reference)
    source: Path | str
    if path.suffix == ".gguf" and os.path.isfile(path):
        source, options["gguf_file"] = path.parent, path.name
    elif os.path.isdir(path):
        source = path
    elif match is not None:
        source, options["revision"] = match["name"], match["revision"]
    else:
        raise ModelLoadError(
            reference,
            "no such tokenizer",
            "give a folder, a .gguf file, a pack, or a Hugging Face id as org/name@revision",
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        # As with models, what transformers raises here has no common class.
        raise ModelLoadError(
            reference,
            f"its tokenizer cannot be loaded ({one_line(str(error), 400)})",
            "name a place that has a tokenizer.json",
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
