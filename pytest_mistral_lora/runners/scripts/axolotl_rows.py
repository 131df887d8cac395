"""The rows that `axolotl preprocess FILE` prepares, and that `axolotl train FILE` would train on."""

from __future__ import annotations

import os
from typing import Any

import yaml
from harness import MARK, CapturedError, Encoded, Task, labelled, main, marked

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
_OTHER_DATA = ("path", "data_files", "ds_type", "split", "name", "revision", "shards", "preprocess_shards")


def encode(task: Task) -> list[Encoded]:
    """Return the rows of the dataset that Axolotl's own command prepares."""
    from axolotl.cli import preprocess

    prepared: Any = None

    def stop(*, cfg: Any, **options: Any) -> None:
        nonlocal prepared
        prepared = original(cfg=cfg, **options).train_dataset
        raise CapturedError

    original, preprocess.load_datasets = preprocess.load_datasets, stop
    try:
        preprocess.do_cli(str(_config(task)))
    except CapturedError:
        return [(row[MARK], labelled(row["input_ids"], row["labels"])) for row in marked(prepared)]
    finally:
        preprocess.load_datasets = original
    raise RuntimeError("Axolotl ended before it had prepared the rows")


def _config(task: Task) -> str:
    config = yaml.safe_load(task.config.read_text(encoding="utf-8")) or {}
    datasets = config.get("datasets") or [{}]
    if len(datasets) != 1:
        raise ValueError(f"{len(datasets)} datasets; one alone can be given other rows")
    kept = {name: value for name, value in datasets[0].items() if name not in _OTHER_DATA}
    given = datasets if task.own_data else [{**kept, "path": str(task.rows_file()), "ds_type": "json"}]
    fixed = {
        "base_model": str(task.checkpoint),
        "datasets": given,
        "dataset_prepared_path": str(task.folder / "prepared"),
        "output_dir": str(task.folder / "out"),
    }
    config = {name: value for name, value in {**config, **_SET, **fixed}.items() if name not in _DROPPED}
    file = task.folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(file)


if __name__ == "__main__":
    # for a script run by hand: `mistral-lora` sets it for its own runs
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    main(encode, _PACKAGES)
