"""Runs of transformers' Trainer that go on from an adapter: one loads it, one drops it, one loads half of it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.training.adapter import peft_quiet

CONFIGURATION = "axolotl.yaml"
HOW = ("right", "dropped", "half")
_ROWS = [[1, *range(1000 + 7 * row, 1000 + 7 * row + 20), 2] for row in range(6)]


@cache
def continued_runs() -> Path:
    """Return a folder with a run `first`, and one of each of `HOW` that goes on from it.

    Each has its configuration, and the adapter and the log of the trainer in `adapter`.
    """
    folder = Path(tempfile.mkdtemp(prefix="continued-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    base = write_tiny_base(folder / "base", shipped_tokenizer("spm-v3"))
    (folder / "eval.jsonl").write_text('{"messages": []}\n')
    for name in ("first", *HOW):
        _run(folder / name, base, name)
    return folder


def configuration(start: str = "", **changed: Any) -> dict[str, Any]:
    """Return the configuration of a run beside the others."""
    written = {
        "base_model": "../base",
        "datasets": [{"path": "../rows.jsonl", "type": "chat_template"}],
        "test_datasets": [{"path": "../eval.jsonl", "type": "chat_template"}],
        "sequence_len": 64,
        "output_dir": "adapter",
        "learning_rate": 0.01,
    }
    return {**written, **({"lora_model_dir": start} if start else {}), **changed}


def _run(folder: Path, base: Path, how: str) -> None:
    folder.mkdir()
    start = folder.parent / "first" / "adapter"
    written = configuration("" if how == "first" else "../first/adapter")
    (folder / CONFIGURATION).write_text(yaml.safe_dump(written))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    with peft_quiet():
        if how == "right":
            model = PeftModel.from_pretrained(model, start, is_trainable=True)
        else:
            model = get_peft_model(model, lora)
        if how == "half":
            tensors = load_file(start / "adapter_model.safetensors")
            set_peft_model_state_dict(model, {name: one for name, one in tensors.items() if ".layers.0." in name})
        arguments = TrainingArguments(
            output_dir=str(folder / "adapter"),
            max_steps=8 if how == "first" else 2,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            eval_on_start=True,
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            per_device_train_batch_size=3,
        )
        rows = [{"input_ids": ids, "labels": ids} for ids in _ROWS]
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:3], data_collator=_collate
        )
        trainer.train()
        trainer.save_model()
        trainer.save_state()


def _collate(rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
