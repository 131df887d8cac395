"""The rows that `axolotl preprocess FILE` prepares, and that `axolotl train FILE` would train on.

With `rl`, Axolotl prepares texts, which TRL's trainer encodes: pairs and rated answers are taken from that trainer.
It cannot sample from a file of one row: for it, the harness passes a single row twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import yaml
from harness import MARK, CapturedError, Encoded, Task, labelled, main, marked, shown_side

_PACKAGES = ("axolotl", "trl", "transformers", "tokenizers", "datasets", "mistral-common", "torch")

_SET = {
    "val_set_size": 0,
    "dataset_num_proc": 1,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "use_wandb": False,
}
"""Keys that are replaced in every configuration; ids and labels do not depend on them."""
_DROPPED = (
    "test_datasets",
    "tokenizer_config",
    "base_model_config",
    "revision_of_model",
    "resume_from_checkpoint",
    "push_dataset_to_hub",
    "hub_model_id",
    "plugins",
    "adapter",
    "lora_model_dir",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "eval_steps",
    "eval_strategy",
    "evals_per_epoch",
    "do_bench_eval",
    "do_causal_lm_eval",
    "attn_implementation",
    "flash_attention",
    "sdp_attention",
    "xformers_attention",
    "wandb_project",
)
"""Keys that name other data, another model, a service, or a GPU's kernel."""
_PAIR_TYPES = ("chat_template.default", "chat_template.argilla_chat", "chat_template.argilla")
"""The types of datasets that render pairs by a chat template; the last one is that of ORPO."""
_OTHER_DATA = ("path", "data_files", "ds_type", "split", "name", "revision", "shards", "preprocess_shards")


class UnwritableRowError(Exception):
    """The type of the dataset cannot hold a row; the message says what it cannot hold."""


def encode(task: Task) -> list[Encoded]:
    """Return the rows of the dataset that Axolotl's own command prepares, or of the trainer of preferences."""
    if not task.name:
        return [(row[MARK], labelled(row["input_ids"], row["labels"])) for row in marked(_prepared(task))]
    refused: list[Encoded] = []
    written: list[dict[str, Any]] = []
    dataset = _dataset(task)
    for row in task.rows:
        try:
            written.append(_in_form(row, dataset))
        except UnwritableRowError as error:
            refused.append((row[MARK], {"error": str(error)}))
    if refused and not written:
        return refused
    return [*refused, *_of_trainer(replace(task, rows=written))]


def _prepared(task: Task) -> Any:
    """Return the dataset that `axolotl preprocess` prepares of chat rows."""
    from axolotl.cli import preprocess

    prepared: Any = None

    def stop(*, cfg: Any, **options: Any) -> None:
        nonlocal prepared
        prepared = original(cfg=cfg, **options).train_dataset
        raise CapturedError

    original, preprocess.load_datasets = preprocess.load_datasets, stop
    try:
        preprocess.do_cli(str(configuration(task)))
    except CapturedError:
        return prepared
    finally:
        preprocess.load_datasets = original
    raise RuntimeError("Axolotl ended before it had prepared the rows")


def _of_trainer(task: Task) -> Iterator[Encoded]:
    """Yield the model inputs of the trainer of preferences: each row alone, through its data collator."""
    import axolotl.train
    from axolotl.cli.train import do_cli

    trainer: Any = None

    def stop(cfg: Any, ready: Any, *_: Any) -> None:
        nonlocal trainer
        trainer = ready
        raise CapturedError

    original, axolotl.train.execute_training = axolotl.train.execute_training, stop
    try:
        do_cli(str(configuration(task)))
    except CapturedError:
        pass
    finally:
        axolotl.train.execute_training = original
    if trainer is None:
        raise RuntimeError("Axolotl ended before it trained")
    for row in marked(trainer.train_dataset):
        number = row.pop(MARK)
        yield number, _columns(trainer.data_collator([row]), task.name)


def _columns(batch: Any, name: str) -> dict[str, Any]:
    """Return the columns of a batch of one row: of TRL's newer collators, or of those of ORPO and CPO."""
    if name == "kto":
        return {**shown_side("completion", batch, 0), "label": bool(batch["label"][0])}
    if "chosen_input_ids" not in batch:
        return {**shown_side("chosen", batch, 0), **shown_side("rejected", batch, 1)}
    made: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        made |= shown_side(side, {key.removeprefix(f"{side}_"): values for key, values in batch.items()}, 0)
    return made


def _dataset(task: Task) -> dict[str, Any]:
    """Return the entry of the configuration's one dataset.

    Raises:
        ValueError: If it has several.
    """
    config = yaml.safe_load(task.config.read_text(encoding="utf-8")) or {}
    datasets = config.get("datasets") or [{}]
    if len(datasets) != 1:
        raise ValueError(f"{len(datasets)} datasets; one alone can be given other rows")
    entry: dict[str, Any] = datasets[0]
    return entry


def configuration(task: Task) -> str:
    """Return a configuration with its model, its data and its output replaced, as a file."""
    config = yaml.safe_load(task.config.read_text(encoding="utf-8")) or {}
    dataset = _dataset(task)
    if not task.own_data:
        kept = {name: value for name, value in dataset.items() if name not in _OTHER_DATA}
        dataset = {**kept, "path": str(task.rows_file()), "ds_type": "json"}
    fixed: dict[str, Any] = {
        "base_model": str(task.checkpoint),
        "datasets": [dataset],
        "dataset_prepared_path": str(task.folder / "prepared"),
        "output_dir": str(task.folder / "out"),
    }
    if task.name:
        fixed["rl"] = task.name
    config = {name: value for name, value in {**config, **_SET, **fixed}.items() if name not in _DROPPED}
    file = task.folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(file)


def _in_form(row: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
    """Return a pair or a rated answer in the columns that the dataset's `type` reads.

    Raises:
        ValueError: If the type reads rows of another kind.
        UnwritableRowError: If the type cannot hold the row.
    """
    kind = dataset.get("type")
    kept = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected", "completion")}
    sides: dict[str, list[dict[str, Any]]] = {
        side: row[side] for side in ("chosen", "rejected", "completion") if side in row
    }
    names = {side: dataset.get(f"field_{side}") or side for side in sides}
    if kind is None or kind == "passthrough.default":
        return row
    if isinstance(kind, dict):
        return {**kept, **_as_texts(row, sides, kind)}
    if "completion" in row:
        raise ValueError(f"type: {kind}; rated answers need a type with fields of your own")
    if kind not in _PAIR_TYPES:
        raise ValueError(f"type: {kind}; pairs need {', '.join(_PAIR_TYPES)}, or a type with fields of your own")
    prompt = row["prompt"]
    if kind == "chat_template.default":
        _refuse_several_messages(sides, kind)
        made = {names[side]: answer[0] for side, answer in sides.items()}
        return {**kept, dataset.get("field_messages") or "messages": prompt, **made}
    if kind == "chat_template.argilla":
        # that of ORPO has a system prompt in a column of its own
        has_system = prompt[0]["role"] == "system"
        kept["system"] = prompt[0]["content"] if has_system else ""
        prompt = prompt[1:] if has_system else prompt
    return {**kept, **{names[side]: [*prompt, *answer] for side, answer in sides.items()}}


def _refuse_several_messages(sides: dict[str, list[dict[str, Any]]], kind: str) -> None:
    """Refuse a row if one of its answers is not a single message.

    Raises:
        UnwritableRowError: With the side.
    """
    for side, answer in sides.items():
        if len(answer) > 1:
            raise UnwritableRowError(f"`{side}` has {len(answer)} messages, and type: {kind} takes one")


def _as_texts(row: dict[str, Any], sides: dict[str, list[dict[str, Any]]], fields: dict[str, Any]) -> dict[str, Any]:
    """Return a row in the fields of a type of the user, which are texts: a question, and a text as each answer.

    Raises:
        UnwritableRowError: If the row has earlier turns, tools, or answers of several messages.
    """
    *before, question = row["prompt"]
    if row.get("tools") or any(message["role"] != "system" for message in before):
        raise UnwritableRowError("the prompt has earlier turns or tools, and type: fields of your own takes one text")
    _refuse_several_messages(sides, "fields of your own")
    made = {fields.get(f"field_{side}") or side: answer[0]["content"] for side, answer in sides.items()}
    made[fields.get("field_system") or "system"] = before[0]["content"] if before else ""
    if "label" in row:
        made[fields.get("field_label") or "label"] = row["label"]
    return {**made, fields.get("field_prompt") or "prompt": question["content"]}


if __name__ == "__main__":
    # for a script run by hand: `mistral-lora` sets it for its own runs
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    main(encode, _PACKAGES)
