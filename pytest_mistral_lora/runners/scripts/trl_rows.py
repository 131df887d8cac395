"""The rows that `trl sft --config FILE` would train on."""

from __future__ import annotations

from typing import Any

import yaml
from harness import MARK, CapturedError, Encoded, Task, main, marked

_PACKAGES = ("trl", "transformers", "tokenizers", "datasets", "accelerate", "mistral-common", "torch")

_SET = {
    "dataset_train_split": "train",
    "eval_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "dtype": "float32",
    "load_in_4bit": False,
    "load_in_8bit": False,
    "use_peft": False,
    "report_to": "none",
    "push_to_hub": False,
}
"""What is another in each run, with another value: ids and labels do not depend on it."""
_DROPPED = ("datasets", "dataset_config", "model_revision", "attn_implementation", "resume_from_checkpoint")
"""What names other data, another model, or a GPU's kernel."""


def encode(task: Task) -> list[Encoded]:
    """Return the model inputs of TRL's own command: each row alone, through its data collator."""
    trainer = ready_trainer(task)
    made: list[Encoded] = []
    for row in marked(trainer.train_dataset):
        # each row alone, so that it is not padded to the length of another
        number = row.pop(MARK)
        batch = trainer.data_collator([row])
        made.append((number, batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return made


def ready_trainer(task: Task) -> Any:
    """Return the `SFTTrainer` of TRL's own command, as it is when it is told to train."""
    import trl
    from trl.scripts import sft

    trainer: Any = None

    def stop(self: Any, *_: Any, **__: Any) -> None:
        nonlocal trainer
        trainer = self
        raise CapturedError

    original, trl.SFTTrainer.train = trl.SFTTrainer.train, stop
    try:
        sft.main(*_parse(sft, task))
    except CapturedError:
        return trainer
    finally:
        trl.SFTTrainer.train = original
    raise RuntimeError("TRL ended before it trained")


def _parse(sft: Any, task: Task) -> Any:
    config = yaml.safe_load(task.config.read_text(encoding="utf-8")) or {}
    fixed = {"model_name_or_path": str(task.checkpoint), "output_dir": str(task.folder / "out")}
    if not task.own_data:
        fixed["dataset_name"] = str(task.rows_file().parent)
    config = {name: value for name, value in {**config, **_SET, **fixed}.items() if name not in _DROPPED}
    file = task.folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return sft.make_parser().parse_args_and_config(["--config", str(file)], fail_with_unknown_args=False)


if __name__ == "__main__":
    main(encode, _PACKAGES)
