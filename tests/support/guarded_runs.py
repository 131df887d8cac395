"""Runs of real trainers for the tests of the guard: a tiny model, its tokenizer, encoded rows and a Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pytest_mistral_lora import MistralGuard, Verdict, guard
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.guarding.steps import LOSS, TrainerWatch

QUESTIONS = ("the sky", "an ant", "Rome", "a prime number", "two and two", "German", "the sea", "a spider")


TRL_SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""The settings of a short run of TRL's trainers, whose loss of each step is logged."""


def chat_rows(count: int) -> list[Row]:
    """Return different sound rows of several lengths."""
    rows = []
    for number in range(count):
        name = QUESTIONS[number % len(QUESTIONS)]
        messages = [
            {"role": "user", "content": f"Tell me of {name}, {number} times."},
            {"role": "assistant", "content": f"{name.capitalize()} it is. " * (1 + number % 3) + "Yes."},
        ]
        rows.append(parse_row({"messages": messages}))
    return rows


def encoded(oracle: Oracle, rows: Sequence[Row], *, messages: bool = False) -> list[dict[str, Any]]:
    """Return rows as a trainer has them: ids and labels, and their messages and tools if asked for."""
    made = []
    for row in rows:
        one = oracle.encode(row)
        record: dict[str, Any] = {"input_ids": list(one.input_ids), "labels": list(one.labels or ())}
        if messages:
            record["messages"] = list(row.messages)
            record |= {"tools": list(row.tools)} if row.tools else {}
        made.append(record)
    return made


class Losses(TrainerCallback):  # type: ignore[misc]
    """Keeps the logged losses, which are those of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.seen.append(logs["loss"])


def lora_model(
    base: Path,
    *,
    adapter: bool = True,
    seed: int = 0,
    weights: Mapping[str, torch.Tensor] | None = None,
    **settings: Any,
) -> Any:
    """Return the tiny model, perhaps with other weights, with a LoRA adapter with dropout, in a known random state."""
    torch.manual_seed(seed)
    [name] = AutoConfig.from_pretrained(base).architectures
    model = getattr(transformers, name).from_pretrained(base)
    if weights is not None:
        model.load_state_dict(weights)
    if not adapter:
        return model
    config = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], **settings}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))


def grown_model(base: Path, **settings: Any) -> Any:
    """Return a model of 29,000 tokens, whose embeddings were resized for the tokenizer, with an adapter."""
    small = base.parent / "small"
    if not small.is_dir():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(29_000)
        model.save_pretrained(small)
    model = AutoModelForCausalLM.from_pretrained(small)
    model.resize_token_embeddings(32_768)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], **settings}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))


def make_trainer(
    base: Path,
    dataset: Any,
    output: Path,
    *,
    model: Any = None,
    tokenizer: Any = None,
    evaluation: Any = None,
    **settings: Any,
) -> Trainer:
    """Return a Trainer of the tiny model that logs the loss of each step."""
    if isinstance(dataset, list):
        dataset = Dataset.from_list(dataset)
    tokenizer = BaseFolder(base).tokenizer().fast if tokenizer is None else tokenizer
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **settings,
    }
    tokenizer.pad_token = tokenizer.pad_token or "<unk>"
    return Trainer(
        model=lora_model(base) if model is None else model,
        args=TrainingArguments(output_dir=str(output), **arguments),
        train_dataset=dataset,
        eval_dataset=evaluation,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
        callbacks=[Losses()],
    )


def losses_of(trainer: Trainer) -> list[float]:
    """Return the losses that a trainer has logged."""
    [kept] = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Losses)]
    return kept.seen


def first_loss(trainer: Any) -> Result:
    """Watch a trainer's first call of `compute_loss` and its backward pass, without the rest of its training."""
    watch = TrainerWatch(trainer.args, trainer.model, trainer, lambda batch: None)
    watch.begin_step(is_judged=True)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batches = [next(iter(trainer.get_train_dataloader()))]
    model = trainer.accelerator.prepare_model(trainer.model)  # which casts, as in `train`
    trainer.training_step(model, batches[0], trainer._get_num_items_in_batch(batches, torch.device("cpu")))
    result = watch.results()[LOSS]
    watch.leave()
    assert "compute_loss" not in vars(trainer)
    return result


def fast_tokenizer(base: Path) -> Any:
    """Return the tokenizer of a base folder, loaded anew."""
    return CheckpointTokenizer(base).fast


def begin(trainer: Any, **settings: Any) -> MistralGuard:
    """Let the guard judge a run, without its steps: before the first one, or as the model gets the batches."""
    callback = guard(trainer, **settings)
    args, state, control, loader = trainer.args, trainer.state, trainer.control, trainer.get_train_dataloader()
    given = {"model": trainer.model, "processing_class": trainer.processing_class, "train_dataloader": loader}
    own, trainer.compute_loss = trainer.compute_loss, lambda *given, **named: None
    callback.on_train_begin(args, state, control, **given)
    if callback.verdict is None:
        trainer.model.train()
        for batch in loader:
            trainer.compute_loss(trainer.model, batch)
        callback.on_train_end(args, state, control)
    trainer.compute_loss = own
    return callback


def errors_of(verdict: Verdict | None) -> set[tuple[str, str]]:
    """Return rule and place of each error of a verdict."""
    assert verdict is not None
    return {(finding.rule, str(finding.place)) for finding in verdict.findings if finding.severity == "error"}


def scale_layers(model: Any, factor: float) -> None:
    """Multiply the change of each adapted layer, as PEFT offers it."""
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(factor)


def detach_last_layer(model: Any) -> None:
    """Cut the last adapted layer off from the loss."""
    [*_, layer] = [module for name, module in model.named_modules() if name.endswith("lora_B.default")]
    own = layer.forward
    layer.forward = lambda *given: own(*given).detach()


class DecaysEverything(torch.optim.AdamW):
    """An optimizer that decays each tensor of a model, and not only its own."""

    model: Any

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.99)
        return super().step(closure)


def decay_everything(trainer: Trainer) -> None:
    """Give a trainer an optimizer that moves the frozen tensors, too."""
    trainer.optimizer = DecaysEverything([one for one in trainer.model.parameters() if one.requires_grad], lr=1e-4)
    trainer.optimizer.model = trainer.model


def optimize_base(trainer: Trainer) -> None:
    """Give a trainer the optimizer of the base, as one that is made before the adapter."""
    base = [parameter for name, parameter in trainer.model.named_parameters() if "lora_" not in name]
    trainer.optimizer = torch.optim.AdamW(base, lr=1e-4)
