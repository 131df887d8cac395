"""Train one tiny run under the guard, with transformers' own Trainer: `python -m ….tiny_run RECIPE EVIDENCE`.

It is a run of the trial of a GPU. The guard judges a copy of the process, which a GPU makes harder than a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.errors import GuardError
from pytest_mistral_lora.guarding.callback import guard
from pytest_mistral_lora.records.files import write_json

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _trainer(recipe: Mapping[str, Any], base: Path, data: Sequence[Mapping[str, Any]], work: Path) -> Trainer:
    """Return a trainer of transformers for a recipe's run, whose rows are fed one by one, without padding."""
    training, lora = recipe["training"], recipe["lora"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=_DTYPES[training["precision"]])
    set_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora["r"], lora_alpha=lora["alpha"], target_modules=lora["target_modules"]
    )
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=training["steps"],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=training["batch_size"],
        learning_rate=training["learning_rate"],
        lr_scheduler_type=training["schedule"],
        bf16=training["precision"] == "bf16",
        fp16=training["precision"] == "fp16",
        use_cpu=training["device"] == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    # with several GPUs and no launcher, Trainer would split batches over threads (DataParallel)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = Trainer(get_peft_model(model, config), arguments, train_dataset=list(data))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _adapter(trainer: Trainer) -> list[torch.Tensor]:
    return [one.detach().cpu().clone() for one in trainer.model.parameters() if one.requires_grad]


def main() -> None:
    """See that the guard stops a run whose EOS is masked; then train a sound one, and write its evidence as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("evidence", type=Path)
    given = parser.parse_args()
    recipe = json.loads(given.recipe.read_text(encoding="utf-8"))
    base, work = given.recipe.parent / recipe["base"]["path"], given.recipe.parent / "guarded"
    oracle = Oracle.load(base)
    rows = [oracle.encode(row) for name in recipe["data"]["train"] for row in read_rows(given.recipe.parent / name)]
    sound = [{"input_ids": list(row.input_ids), "labels": list(row.labels or ())} for row in rows]
    masked = _trainer(recipe, base, [{**row, "labels": [*row["labels"][:-1], IGNORE_INDEX]} for row in sound], work)
    before = _adapter(masked)
    guard(masked, tokenizer=base)
    try:
        masked.train()
    except GuardError as error:
        if "ML546" not in str(error):
            raise
    else:
        raise SystemExit("the guard did not stop a run whose EOS is masked")
    if not all(map(torch.equal, before, _adapter(masked))):
        raise SystemExit("the guard stopped a run after a weight had moved")
    trainer = _trainer(recipe, base, sound, work)
    callback = guard(trainer, tokenizer=base)
    begin = time.monotonic()
    trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    write_json(
        given.evidence,
        {
            "losses": [line["loss"] for line in steps],
            "gradient_norms": [line["grad_norm"] for line in steps],
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "seconds": time.monotonic() - begin,
            "guard": str(callback.verdict),
        },
    )


if __name__ == "__main__":
    main()
