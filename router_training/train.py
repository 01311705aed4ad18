"""Trains the router with Hugging Face's `Trainer`: one process, or several under `torchrun`."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from router_training.config import Train
from router_training.encode import Encoder, Example
from router_training.errors import DatasetInvalid, StorageFailed
from router_training.metrics import spearman
from router_training.model import initial_model, initial_tokenizer, merged
from router_training.rows import Row
from router_training.stages import process_count, write_atomically
from services.engines.router_format import OrdinalRule, QuantileRule, ScoreRule, SoftmaxRule

_log = logging.getLogger(__name__)
_STATE_NAME = "trainer_state.json"


def score_rule(kind: str, class_count: int) -> ScoreRule:
    """Returns how logits of a label kind are read; the upper half of the classes is positive."""
    match kind:
        case "softmax":
            return SoftmaxRule(1)
        case "quantile":
            return QuantileRule(class_count // 2)
        case "ordinal":
            return OrdinalRule(class_count // 2)
    raise ValueError(f"unknown label kind {kind!r}")


def train(
    splits: tuple[Sequence[Row], Sequence[Row]],
    edges: Sequence[float],
    rule: ScoreRule,
    settings: Train,
    folder: Path,
) -> dict[str, Any]:
    """Trains on the first split, selects by Spearman's ρ on the second, saves `folder/model`.

    `edges` are the upper edges of all classes but the last. A run that was killed goes on from its
    last whole checkpoint. Returns what the training log has of the selected checkpoint.

    Raises:
        ConfigInvalid, DatasetInvalid, StorageFailed
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    tokenizer = initial_tokenizer(settings)
    encoder = Encoder(tokenizer, annotated=settings.annotated, max_tokens=settings.max_tokens)
    training, validation = (_Examples(encoder.examples(rows, edges)) for rows in splits)
    model = initial_model(settings, rule.logit_count(len(edges) + 1))
    arguments = _arguments(settings, len(training), folder / "checkpoints")
    trainer = RouterTrainer(
        model=model,
        args=arguments,
        train_dataset=training,
        eval_dataset=validation,
        data_collator=Padding(model.config.pad_token_id),
        compute_metrics=lambda prediction: _selected_by(prediction, rule),
        callbacks=[EarlyStoppingCallback(settings.patience), KeepZeros()],
    )
    trainer.rule = rule
    # What the first process removed is gone for all before they look for a checkpoint.
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=_last_whole(folder / "checkpoints"))
        if trainer.is_world_process_zero():
            _save(merged(trainer.model), tokenizer, settings, folder / "model")
    except OSError as error:
        raise StorageFailed(
            f"{folder}: a checkpoint cannot be written ({error.strerror or error}); make room and "
            "run the same command again: it goes on from the last whole one"
        ) from None
    best = trainer.state.best_metric
    if best is None or not math.isfinite(best):
        raise DatasetInvalid(
            "train: the validation questions give no rank correlation; all their advantages or "
            "all scores are equal: collect more questions or lower train.learning_rate"
        )
    return {"validation_rho": best, "step_count": trainer.state.global_step}


class RouterTrainer(Trainer):
    """A `Trainer` with the loss of the score rule's kind."""

    rule: ScoreRule
    loss_is_scaled_for_ga = False  # each batch's loss is a mean of its own rows

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns cross-entropy over classes, or over the thresholds between ordered ones."""
        labels = inputs.pop("labels")[:, 0].long()  # [rows]; column 1 is the advantage
        outputs = model(**inputs)
        logits = outputs.logits  # [rows, logits]
        if isinstance(self.rule, OrdinalRule):
            above = labels[:, None] > torch.arange(logits.shape[1], device=labels.device)
            loss = functional.binary_cross_entropy_with_logits(logits, above.to(logits.dtype))
        else:
            loss = functional.cross_entropy(logits, labels)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Returns loss, logits and labels, which `compute_loss` has taken out of the inputs."""
        model, inputs, loss_only, *_ = *args, *kwargs.values()
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, dict(inputs), return_outputs=True)
        return (loss, None, None) if loss_only else (loss, outputs.logits, labels)


class KeepZeros(TrainerCallback):
    """Keeps weights that were exactly zero at zero: they are structure.

    A reward model may carry its tokens' identities in dimensions that no layer writes to; the
    first optimiser step would write noise there that later norms blow up.
    """

    def __init__(self) -> None:
        self._masks: list[tuple[nn.Parameter, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remembers where the zeros are. Adapters and fresh matrices of zeros only are no such."""
        self._masks = [
            (parameter, parameter != 0)
            for name, parameter in kwargs["model"].named_parameters()
            if parameter.requires_grad
            and "lora_" not in name
            and bool((parameter == 0).any())
            and bool((parameter != 0).any())
        ]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts them back."""
        with torch.no_grad():
            for parameter, mask in self._masks:
                parameter.mul_(mask)


class Padding:
    """Makes a batch of examples: ids padded on the right, labels [rows, 2]."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns `input_ids`, `attention_mask` [rows, tokens] and `labels` [rows, 2]."""
        longest = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), longest), self._pad_id)
        mask = torch.zeros((len(examples), longest), dtype=torch.long)
        for index, example in enumerate(examples):
            count = len(example["input_ids"])
            ids[index, :count] = torch.tensor(example["input_ids"])
            mask[index, :count] = 1
        labels = torch.tensor([example["labels"] for example in examples], dtype=torch.float32)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class _Examples(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        return {"input_ids": example.input_ids, "labels": (example.label, example.advantage)}


def _arguments(settings: Train, example_count: int, folder: Path) -> TrainingArguments:
    rows_per_step = settings.batch_rows * settings.accumulation_steps * process_count()
    step_count = max(1, math.ceil(example_count * settings.epochs / rows_per_step))
    every = max(1, step_count // settings.evaluations)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_rows,
        per_device_eval_batch_size=settings.batch_rows * 2,
        gradient_accumulation_steps=settings.accumulation_steps,
        max_steps=step_count,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(settings.warmup_share * step_count),
        bf16=settings.precision == "bfloat16",
        activation_checkpointing=settings.activation_checkpointing,
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        logging_steps=every,
        load_best_model_at_end=True,
        metric_for_best_model="rho",
        greater_is_better=True,
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        # Left to itself, the trainer leaves several processes without a GPU to train each alone.
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _selected_by(prediction: EvalPrediction, rule: ScoreRule) -> dict[str, float]:
    scores = np.array([rule.score(row) for row in np.asarray(prediction.predictions).tolist()])
    advantages = np.asarray(prediction.label_ids)[:, 1].astype(float)
    rho = spearman(scores, advantages)
    return {"rho": rho if math.isfinite(rho) else -1.0}


def _last_whole(folder: Path) -> str | None:
    """Returns the newest checkpoint that was written to its end."""
    # The trainer writes its state last.
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_STATE_NAME}")]
    newest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    return None if newest is None else str(newest)


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, settings: Train, folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    write_atomically(partial / "training.json", settings.model_dump_json(indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
