"""A run of a real `Trainer` that is planned: rows, model, tokenizer and settings, which a fault may change first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from guarded_runs import chat_rows, encoded, lora_model, make_trainer
from torch.nn.functional import cross_entropy
from transformers import Trainer

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder

Batch = dict[str, Any]
Rows = list[dict[str, Any]]

TOKENIZER = "spm-v3"
SIZE = 8
"""The rows of a run; a batch has two of them."""
STEPS = (40, 100)
"""The steps for which a model learns the rows by heart: what sure tokens do is hidden by a fresh one."""


@dataclass
class Plan:
    """A sound run, before its trainer is made.

    Attributes:
        base: The folder of the tiny model.
        folder: An empty folder.
        chats: The conversations.
        has_messages: Whether the rows have their messages beside their ids.
        tokens: The tokenizer whose ids the rows have.
        lora: Arguments of the adapter; None for a full fine-tune.
        steps: How many steps the model has learned the rows by heart; 0 for a fresh one.
        settings: Keys of `TrainingArguments`.
        guarded: Arguments of the guard.
        evaluation: The rows of the evaluation.
        loss_func: The trainer's `compute_loss_func`.
        own_loss: The loss in the trainer's own `compute_loss`, of the logits and the batch.
        collated: Changes a batch behind the collator.
        of_dataset: Makes the dataset of the rows.
        before, after: Change the model, and the trainer.
    """

    base: Path
    folder: Path
    chats: list[Row] = field(default_factory=lambda: chat_rows(SIZE))
    has_messages: bool = False
    tokens: str = TOKENIZER
    lora: dict[str, Any] | None = field(default_factory=dict)
    steps: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    guarded: dict[str, Any] = field(default_factory=dict)
    evaluation: Rows | None = None
    loss_func: Callable[..., Any] | None = None
    own_loss: Callable[[torch.Tensor, Batch], torch.Tensor] | None = None
    collated: Callable[[Batch], Any] | None = None
    of_dataset: Callable[[Rows], Any] = list
    before: Callable[[Any], Any] = lambda model: None
    after: Callable[[Any], Any] = lambda trainer: None

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(shipped_tokenizer(self.tokens))

    @cached_property
    def rows(self) -> Rows:
        """The encoded rows."""
        return encoded(self.oracle, self.chats, messages=self.has_messages)

    @cached_property
    def tokenizer(self) -> Any:
        return BaseFolder(self.base).tokenizer().fast

    def talk(self, *turns: tuple[str, str]) -> None:
        """Give each row one conversation, of roles and texts; `{}` is its number."""
        self.chats = [
            parse_row({"messages": [{"role": role, "content": text.format(n)} for role, text in turns]})
            for n in range(SIZE)
        ]

    def render(self, template: str) -> None:
        """Give the rows the ids of a chat template, with labels where it marks answers."""
        for row, chat in zip(self.rows, self.chats, strict=True):
            given = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True}
            made = self.tokenizer.apply_chat_template(list(chat.messages), **given)
            marked = zip(made["input_ids"], made["assistant_masks"], strict=True)
            row |= {"input_ids": made["input_ids"], "labels": [token if mark else -100 for token, mark in marked]}

    def trainer(self) -> Trainer:
        """Make the trainer."""
        weights = learned(self.base)[self.steps] if self.steps else None
        model = lora_model(self.base, adapter=self.lora is not None, weights=weights, **(self.lora or {}))
        self.before(model)
        settings = {"gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential", "max_steps": 2}
        trainer = make_trainer(
            self.base,
            self.of_dataset(self.rows),
            self.folder,
            model=model,
            tokenizer=self.tokenizer,
            evaluation=self.evaluation,
            **settings | self.settings,
        )
        trainer.compute_loss_func = self.loss_func
        if self.own_loss is not None:
            trainer.__class__ = type("OwnTrainer", (OwnTrainer,), {"own_loss": staticmethod(self.own_loss)})
        if self.collated is not None:
            trainer.data_collator = _Changing(trainer.data_collator, self.collated)
            trainer.args.remove_unused_columns = False
        self.after(trainer)
        return trainer


class OwnTrainer(Trainer):  # type: ignore[misc]
    """A trainer with a loss of its own."""

    own_loss: Callable[[torch.Tensor, Batch], torch.Tensor]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = type(self).own_loss(outputs.logits, dict(inputs))
        return (loss, outputs) if return_outputs else loss


class _Changing:
    """A collator of the user's, which changes what another one makes."""

    def __init__(self, collate: Any, change: Callable[[Batch], Any]) -> None:
        self.collate, self.change = collate, change

    def __call__(self, rows: Rows) -> Any:
        batch = dict(self.collate([{key: row[key] for key in ("input_ids", "labels")} for row in rows]))
        changed = self.change(batch)
        return batch if changed is None else changed


def token_losses(logits: torch.Tensor, labels: torch.Tensor, *, by: int = 1) -> torch.Tensor:
    """Return the cross entropy of labels that stand `by` places further on, `(batch, length - by)`; 0 at -100."""
    size = logits.shape[1] - by
    losses = cross_entropy(logits[:, :size].flatten(0, 1).float(), labels[:, by:].flatten(), reduction="none")
    return losses.reshape(len(labels), size)


def mean_loss(logits: torch.Tensor, labels: torch.Tensor, *, by: int = 1) -> torch.Tensor:
    """Return the mean of `token_losses` where there is a label."""
    return token_losses(logits, labels, by=by).sum() / (labels[:, by:] != -100).sum()


@cache
def learned(base: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Return the weights of the tiny model after each number of `STEPS` on the sound rows, prompts included.

    After 40 steps the median token has a probability of 1 - 2e-4, after 100 steps of 1 - 6e-5.
    """
    model = lora_model(base, adapter=False)
    rows = encoded(Oracle(shipped_tokenizer(TOKENIZER)), chat_rows(SIZE))
    longest = max(len(row["input_ids"]) for row in rows)
    labels = torch.tensor([[*row["input_ids"], *[-100] * (longest - len(row["input_ids"]))] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = {}
    for step in range(1, max(STEPS) + 1):
        mean_loss(model(input_ids=labels.clamp(min=0)).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in STEPS:
            found[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return found
