"""One contestant of benchmarks/train.py, in a process of its own: train, measure, and write what was found.

    python contestant.py TASK.json RESULT.json

Only `ours` imports pytest_mistral_lora: a peer needs an environment with torch, transformers and peft, and TRL for its
own two. All start from the same base and adapter files, and read the same ids and labels.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from meters import Row, StepClock, memory, needed_flops, possible_flops, tokens
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from report import OURS, PACKED, PADDED, PLAIN, SHARED
from torch.utils.data import SequentialSampler
from transformers import MistralForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments


def ours(task: dict[str, Any], model: Any, rows: list[Row], work: Path) -> Trainer:
    """Return this project's trainer."""
    from pytest_mistral_lora.chat.encoded import EncodedRow
    from pytest_mistral_lora.training.loop import make_trainer
    from pytest_mistral_lora.training.recipe import Training
    from pytest_mistral_lora.training.step import StepSampler

    training = Training.model_validate(
        {
            "epochs": 1,
            "learning_rate": task["learning_rate"],
            "schedule": "constant",
            "batch_size": task["batch_size"],
            "micro_batch_tokens": task["micro_batch_tokens"],
            "seed": task["seed"],
            "precision": task["precision"],
            "device": task["device"],
            "activation_checkpointing": task["checkpointing"],
            "logging_steps": 1,
            "checkpoint_steps": 1_000_000,
            "share_prefix": task["contestant"] == SHARED,
        }
    )
    # laid so that the trainer, which draws rows by its seed, draws them as they lie in the file
    (drawn,) = StepSampler(np.array([len(row["input_ids"]) for row in rows]), len(rows), seed=task["seed"])
    laid = dict(zip(drawn, rows, strict=True))
    in_place = [laid[place] for place in range(len(rows))]
    encoded = [EncodedRow(tuple(row["input_ids"]), tuple(row["labels"]), ()) for row in in_place]
    return make_trainer(model, training, encoded, [], work=work)


def transformers_trainer(task: dict[str, Any], model: Any, rows: list[Row], work: Path) -> Trainer:
    """Return the plain Trainer: batches padded to their longest row, the model's own loss."""
    from transformers import DataCollatorForSeq2Seq

    arguments = TrainingArguments(**_stock(task, work), per_device_train_batch_size=task["micro_batch_size"])
    collator = DataCollatorForSeq2Seq(_padding(task))
    return _in_order(Trainer)(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), data_collator=collator
    )


def trl_padded(task: dict[str, Any], model: Any, rows: list[Row], work: Path) -> Trainer:
    """Return TRL's SFTTrainer as it pads."""
    return _trl(task, model, rows, work, per_device_train_batch_size=task["micro_batch_size"], max_length=None)


def trl_packed(task: dict[str, Any], model: Any, rows: list[Row], work: Path) -> Trainer:
    """Return TRL's SFTTrainer with its packing (best fit decreasing), one pack a step."""
    packing = {"packing": True, "packing_strategy": "bfd", "max_length": task["pack_length"]}
    trainer = _trl(task, model, rows, work, per_device_train_batch_size=1, gradient_accumulation_steps=1, **packing)
    trainer.train_dataset = trainer.train_dataset.shuffle(seed=task["seed"])  # packs come sorted by length
    return trainer


def _trl(task: dict[str, Any], model: Any, rows: list[Row], work: Path, **settings: Any) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    return _in_order(SFTTrainer)(
        model=model,
        args=SFTConfig(**{**_stock(task, work), **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=_padding(task),
    )


CONTESTANTS = {OURS: ours, SHARED: ours, PLAIN: transformers_trainer, PADDED: trl_padded, PACKED: trl_packed}
LIBRARIES = ("torch", "transformers", "peft", "trl")


def _stock(task: dict[str, Any], work: Path) -> dict[str, Any]:
    """Return the settings that all peers share."""
    return {
        "output_dir": str(work),
        "num_train_epochs": 1,
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "gradient_accumulation_steps": task["batch_size"] // task["micro_batch_size"],
        "gradient_checkpointing": task["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": task["precision"] == "bf16",
        "use_cpu": task["device"] == "cpu",
        "dataloader_pin_memory": task["device"] == "cuda",
        "seed": task["seed"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _in_order(trainer: type[Trainer]) -> type[Trainer]:
    """Return a trainer that takes its rows as they come: they lie in the order in which ours draws them."""

    class InOrder(trainer):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    return InOrder


def _padding(task: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that can only pad: the rows are ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"<pad>": task["pad_id"]}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")


def load_model(task: dict[str, Any]) -> Any:
    """Return the base with the adapter that all start from, every weight in memory."""
    dtype = _dtype(task)
    settings = {"attn_implementation": task["attention"]} if task["attention"] else {}
    base = MistralForCausalLM.from_pretrained(task["base"], dtype=dtype, local_files_only=True, **settings)
    base.config.use_cache = False
    model = PeftModel.from_pretrained(base.to(task["device"]), task["adapter"], is_trainable=True)
    for weight in model.parameters():
        weight.detach().sum()  # a mapped file is memory only once it has been read
    return model


def _dtype(task: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if task["precision"] == "bf16" else torch.float32


@torch.no_grad()
def held_out_loss(task: dict[str, Any], adapter: dict[str, torch.Tensor], rows: list[Row]) -> float:
    """Return the mean loss of all supervised tokens, in nats: each row alone, by a model loaded anew."""
    model = load_model(task).eval()
    set_peft_model_state_dict(model, adapter)
    total, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[name]], device=task["device"]) for name in ("input_ids", "labels"))
        tokens = int((labels[:, 1:] != -100).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * tokens
        count += tokens
    return total / count


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Train once, and return what was measured."""
    torch.set_num_threads(task["threads"])
    rows: dict[str, list[Row]] = json.loads(Path(task["rows"]).read_text())
    model = load_model(task)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as work:
        trainer = CONTESTANTS[task["contestant"]](task, model, rows["train"], Path(work))
        trainer.add_callback(clock)
        gc.collect()
        with memory(task["device"]) as peak:
            trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    # what one step took: rows as they lie, or a pack
    fed, in_step = (trainer.train_dataset, 1) if task["contestant"] == PACKED else (rows["train"], task["batch_size"])
    batches = [[fed[place] for place in range(first, first + in_step)] for first in range(0, len(fed), in_step)]
    config, adapter = model.config, {name: one.cpu() for name, one in get_peft_model_state_dict(model).items()}
    del model, trainer
    gc.collect()
    return {
        "steps": [
            {"wall": wall, "cpu": cpu, "loss": loss, **tokens(batch)}
            for wall, cpu, loss, batch in zip(clock.wall, clock.cpu, losses, batches, strict=True)
        ],
        "memory": peak.peak - peak.before,
        "held_out_loss": held_out_loss(task, adapter, rows["held_out"]),
        "needed_flops": needed_flops(config, task["rank"], rows["train"]),
        "possible_flops": possible_flops(config, task["gemm_tokens"], task["device"], _dtype(task)),
        "versions": {name: version(name) for name in LIBRARIES if name in sys.modules},
    }


def main(task: str, result: str) -> None:
    """Run the task of one file, and write the other."""
    Path(result).write_text(json.dumps(run(json.loads(Path(task).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
