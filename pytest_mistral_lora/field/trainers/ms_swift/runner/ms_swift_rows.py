"""The rows that `swift sft FILE` would train on, or `swift rlhf FILE` by its `rlhf_type`: pairs or rated answers.

For KTO it drops a row whose answer is that of the row that it is compared with: the harness gives them two texts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import yaml
from harness import MARK, CapturedError, Encoded, Task, labelled, main, marked, shown_side

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
    "ref_model",
    "ref_model_type",
    "ref_model_revision",
    "ref_adapters",
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
    from swift.pipelines.train import rlhf, sft

    keep_marks()
    pipeline = rlhf.SwiftRLHF if task.name else sft.SwiftSft
    trainer: Any = None

    def stop(self: Any, given: Any) -> None:
        nonlocal trainer
        trainer = given
        raise CapturedError

    original, sft.SwiftSft.train = sft.SwiftSft.train, stop
    try:
        pipeline(words(task)).run()
    except CapturedError:
        return list(_made(trainer, task.name))
    finally:
        sft.SwiftSft.train = original
    raise RuntimeError("ms-swift ended before it trained")


def keep_marks() -> None:
    """Let the preprocessors keep the column with the numbers of the rows."""
    from swift.dataset import RowPreprocessor

    if MARK not in RowPreprocessor.standard_keys:
        RowPreprocessor.standard_keys = [*RowPreprocessor.standard_keys, MARK]


def _made(trainer: Any, name: str) -> Iterator[Encoded]:
    dataset = trainer.train_dataset
    for row in marked(dataset.dataset):
        number = row.pop(MARK)
        try:
            encoded = dataset.encode_func(row, return_length=True)
        except Exception:
            # ms-swift logs the error and trains on another row, drawn at random: this row is left out
            continue
        yield number, _columns(trainer.data_collator([encoded]), name)


def _columns(batch: Any, name: str) -> dict[str, Any]:
    """Return the columns of a batch of one row."""
    if not name:
        columns: dict[str, Any] = labelled(batch["input_ids"][0].tolist(), batch["labels"][0].tolist())
        return columns
    if name == "kto":
        # the other half of the batch is the answer of another row, for the KL term
        of_answer = {column.removeprefix("completion_"): values for column, values in batch.items()}
        return {**shown_side("completion", of_answer, 0), "label": bool(batch["label"][0])}
    return {**shown_side("chosen", batch, 0), **shown_side("rejected", batch, 1)}


def words(task: Task) -> list[str]:
    """Return the configuration as words of the command line, as `swift sft FILE` makes them of it."""
    config = yaml.safe_load(task.config.read_text(encoding="utf-8")) or {}
    fixed: dict[str, Any] = {"model": str(task.checkpoint), "output_dir": str(task.folder / "out")}
    if task.name:
        # without padding, both sides of a pair would be one sequence
        fixed |= {"rlhf_type": task.name, "padding_free": False}
    if not task.own_data:
        fixed["dataset"] = str(task.rows_file([_in_form(row) for row in task.rows]))
    config = {name: value for name, value in {**config, **_SET, **fixed}.items() if name not in _DROPPED}
    spelled: list[str] = []
    for name, value in config.items():
        spelled += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return spelled


def _in_form(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row in ms-swift's own form: a pair is two conversations, and a rated answer is one with a label."""
    if "messages" in row:
        return row
    kept = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected", "completion")}
    made = {**kept, "messages": [*row["prompt"], *row.get("chosen", row.get("completion", ()))]}
    if "rejected" in row:
        # its short form, `rejected_response`, would replace the calls and results behind the last turn of the user
        made["rejected_messages"] = [*row["prompt"], *row["rejected"]]
        if "tools" in row:
            made["rejected_tools"] = row["tools"]
    return made


if __name__ == "__main__":
    # for a script that is run by hand: no GPU is looked for, and nothing is fetched
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(encode, _PACKAGES)
