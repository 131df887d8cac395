"""The rows that `swift sft FILE` would train on."""

from __future__ import annotations

import os
from typing import Any

import yaml
from harness import MARK, CapturedError, Encoded, Task, labelled, main, marked

_PACKAGES = ("ms-swift", "trl", "transformers", "tokenizers", "datasets", "peft", "mistral-common", "torch")

_SET = {
    "torch_dtype": "float32",
    "bf16": False,
    "fp16": False,
    "split_dataset_ratio": 0,
    "report_to": "none",
    "push_to_hub": False,
    "load_from_cache_file": False,
    # else the folder's name is looked up at ModelScope
    "use_hf": True,
    "check_model": False,
}
"""Keys that are replaced in every configuration; ids and labels do not depend on them."""
_DROPPED = (
    "val_dataset",
    "cached_dataset",
    "cached_val_dataset",
    "adapters",
    "resume_from_checkpoint",
    "model_revision",
    "deepspeed",
    "fsdp",
    "attn_impl",
    "quant_method",
    "quant_bits",
    "eval_strategy",
    "eval_steps",
    "ENV",
)
"""Keys that name other data, another model, an environment, or a GPU's kernel."""


def encode(task: Task) -> list[Encoded]:
    """Return the model inputs of ms-swift's own command: each row by itself, through its data collator."""
    from swift.pipelines.train import sft

    keep_marks()
    trainer: Any = None

    def stop(self: Any, given: Any) -> None:
        nonlocal trainer
        trainer = given
        raise CapturedError

    original, sft.SwiftSft.train = sft.SwiftSft.train, stop
    try:
        sft.SwiftSft(words(task)).run()
    except CapturedError:
        return list(_made(trainer))
    finally:
        sft.SwiftSft.train = original
    raise RuntimeError("ms-swift ended before it trained")


def keep_marks() -> None:
    """Let the preprocessors keep the column with the numbers of the rows."""
    from swift.dataset import RowPreprocessor

    if MARK not in RowPreprocessor.standard_keys:
        RowPreprocessor.standard_keys = [*RowPreprocessor.standard_keys, MARK]


def _made(trainer: Any) -> Any:
    dataset = trainer.train_dataset
    for row in marked(dataset.dataset):
        number = row.pop(MARK)
        try:
            encoded = dataset.encode_func(row, return_length=True)
        except Exception:
            # ms-swift logs the error and trains on another row, drawn at random: this row is left out
            continue
        batch = trainer.data_collator([encoded])
        yield number, labelled(batch["input_ids"][0].tolist(), batch["labels"][0].tolist())


def words(task: Task) -> list[str]:
    """Return the configuration as words of the command line, as `swift sft FILE` makes them of it."""
    config = yaml.safe_load(task.config.read_text(encoding="utf-8")) or {}
    fixed = {"model": str(task.checkpoint), "output_dir": str(task.folder / "out")}
    if not task.own_data:
        fixed["dataset"] = str(task.rows_file())
    config = {name: value for name, value in {**config, **_SET, **fixed}.items() if name not in _DROPPED}
    spelled: list[str] = []
    for name, value in config.items():
        spelled += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return spelled


if __name__ == "__main__":
    # for a script that is run by hand: no GPU is looked for, and nothing is fetched
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(encode, _PACKAGES)
