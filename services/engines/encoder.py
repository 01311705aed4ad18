"""An encoder: a classifier whose tokens see each other in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


def is_encoder(model: PreTrainedModel) -> bool:
    """Returns whether a sequence classifier is of the kind that reads both ways."""
    # A decoder's classifier reads the last token with a plain `score`; what else there is pools
    # in ways of its own. Those with a decoder behind the encoder read their input twice.
    return not hasattr(model, "score") and not model.config.is_encoder_decoder


class EncoderModel:
    """A stock sequence classifier, with the pooling and the head of its own kind."""

    def __init__(self, model: PreTrainedModel, tokenizer_limit_tokens: int) -> None:
        self.model = model.train(False)
        # The tokenizer knows the places that a family keeps for itself, as RoBERTa's padding.
        known: int = model.config.get_text_config().max_position_embeddings
        self.max_context_tokens = min(known, tokenizer_limit_tokens)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> list[float]:
        """Returns the logits [labels] of a sequence."""
        row = torch.tensor([token_ids], device=self.model.device)
        logits: list[float] = self.model(input_ids=row).logits[0].float().tolist()
        return logits
