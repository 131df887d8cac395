"""The rows that `trl sft --config FILE` would train on, or `trl dpo`, `trl kto` and `trl reward`.

What makes rated answers of pairs carries every column along, and puts all chosen answers first: so the harness keeps
the numbers of rows that come back in a column.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import yaml
from harness import MARK, CapturedError, Encoded, Task, labelled, main, marked, shown_side

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


_TRAINERS = {
    "": ("sft", "SFTTrainer"),
    "dpo": ("dpo", "DPOTrainer"),
    "kto": ("kto", "KTOTrainer"),
    "reward": ("reward", "RewardTrainer"),
}
"""The script and the trainer of each command."""


def encode(task: Task) -> list[Encoded]:
    """Return the model inputs of TRL's own command: each row alone, through its data collator."""
    trainer = ready_trainer(task)
    made: list[Encoded] = []
    for row in marked(trainer.train_dataset):
        # each row alone, so that it is not padded to the length of another
        number = row.pop(MARK)
        made.append((number, _columns(trainer.data_collator([row]), task.name)))
    return _paired(made) if task.name == "kto" else made


def _paired(made: list[Encoded]) -> list[Encoded]:
    """Return one record for each pair, of which TRL's KTO has made two rated answers."""
    by_number: dict[int, list[dict[str, Any]]] = {}
    for number, columns in made:
        by_number.setdefault(number, []).append(columns)
    return [(number, _both_sides(answers) if len(answers) > 1 else answers[0]) for number, answers in by_number.items()]


def _both_sides(answers: list[dict[str, Any]]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for answer in answers:
        side = "chosen" if answer.pop("label") else "rejected"
        columns |= {key.replace("completion", side): values for key, values in answer.items()}
    return columns


def _columns(batch: Any, name: str) -> dict[str, Any]:
    """Return the columns of a batch of one row; sides of a pair are padded to one length."""
    if not name:
        columns: dict[str, Any] = labelled(batch["input_ids"][0].tolist(), batch["labels"][0].tolist())
        return columns
    if name == "kto":
        return {"label": bool(batch["label"][0]), **shown_side("completion", batch, 0)}
    return {**shown_side("chosen", batch, 0), **shown_side("rejected", batch, 1)}


def ready_trainer(task: Task) -> Any:
    """Return the trainer of TRL's own command, as it is when it is told to train."""
    import trl

    script, name = _TRAINERS[task.name]
    command = importlib.import_module(f"trl.scripts.{script}")
    trainer_class = getattr(trl, name)
    trainer: Any = None

    def stop(self: Any, *_: Any, **__: Any) -> None:
        nonlocal trainer
        trainer = self
        raise CapturedError

    original, trainer_class.train = trainer_class.train, stop
    try:
        words = ["--config", str(configuration(task))]
        command.main(*command.make_parser().parse_args_and_config(words, fail_with_unknown_args=False))
    except CapturedError:
        return trainer
    finally:
        trainer_class.train = original
    raise RuntimeError("TRL ended before it trained")


def configuration(task: Task) -> Path:
    """Write the configuration with its model, its data and its output replaced, and return the file."""
    config = yaml.safe_load(task.config.read_text(encoding="utf-8")) or {}
    fixed = {"model_name_or_path": str(task.checkpoint), "output_dir": str(task.folder / "out")}
    if not task.own_data:
        fixed["dataset_name"] = str(task.rows_file().parent)
    config = {name: value for name, value in {**config, **_SET, **fixed}.items() if name not in _DROPPED}
    file: Path = task.folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


if __name__ == "__main__":
    main(encode, _PACKAGES)
