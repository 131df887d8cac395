"""Adapters of another base, another scale or an earlier step than they are taken for."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import yaml
from bench_adapter import COMMIT, CONFIG, TENSORS
from continued_runs import configuration, continued_runs
from gallery import Artifact, mutant


@mutant("ML428", says="is multiplied by 64")
def alpha_multiplied_once_more(artifact: Artifact) -> None:
    """A conversion multiplied the scale into lora_alpha, which has it already."""
    artifact["config"]["lora_alpha"] = 512


@mutant("ML428 ML426", says="is multiplied by 33.9411")
def scale_of_another_formula(artifact: Artifact) -> None:
    """use_rslora was set for an alpha that was meant to be divided by the rank."""
    artifact["config"] |= {"use_rslora": True, "lora_alpha": 96}


def without_manifest(artifact: Artifact, base: str) -> None:
    """Make the adapter another trainer's, whose configuration alone names the base."""
    (artifact["folder"] / "manifest.json").unlink()
    artifact["config"] |= {"base_model_name_or_path": base, "revision": COMMIT}


@mutant("ML429", says="has 32,768")
def base_of_another_version(artifact: Artifact) -> None:
    """The name is that of a base of the same size with another vocabulary."""
    without_manifest(artifact, "mistralai/Mistral-7B-v0.1")


@mutant("ML429", says="a model of type mistral")
def base_of_another_family(artifact: Artifact) -> None:
    """The name is that of another family."""
    without_manifest(artifact, "Qwen/Qwen2.5-7B-Instruct")


def base_elsewhere(artifact: Artifact, **changed: object) -> None:
    """Name a copy of the base in another folder, whose configuration may be changed."""
    named = artifact["folder"].parent / "named"
    shutil.copytree(artifact["base"], named)
    config = json.loads((named / "config.json").read_text()) | changed
    (named / "config.json").unlink()
    (named / "config.json").write_text(json.dumps(config))
    without_manifest(artifact, str(named))


@mutant("ML429", says="whose rms_norm_eps is 0.1")
def named_base_computes_something_else(artifact: Artifact) -> None:
    """The named base is at hand, and another one is given."""
    base_elsewhere(artifact, rms_norm_eps=0.1)


def checkpoint(artifact: Artifact, step: int, *, top: int | None, best: str = "") -> Path:
    """Leave a checkpoint of a run below the adapter, an hour later and with other bytes.

    Args:
        artifact: The adapter.
        step: The step of the checkpoint.
        top: The step in the state beside the adapter; None to leave none there.
        best: The checkpoint that the run calls its best one.
    """
    folder = artifact["folder"]
    last = folder / f"checkpoint-{step}"
    last.mkdir()
    for name in (CONFIG, TENSORS):
        shutil.copy(folder / name, last / name)
    (last / TENSORS).write_bytes((last / TENSORS).read_bytes() + b" ")
    later = (folder / TENSORS).stat().st_mtime + 3600
    os.utime(last / TENSORS, (later, later))
    state = {"global_step": step, "best_model_checkpoint": best or None}
    (last / "trainer_state.json").write_text(json.dumps(state))
    if top is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": top}))
    return last


@mutant("ML455", says="was saved at step 500, and checkpoint-1000 below it at step 1000")
def run_that_went_on(artifact: Artifact) -> None:
    """The run was continued, and its output has the adapter of its first end."""
    checkpoint(artifact, 1000, top=500)


@mutant("ML455", says="60 minutes older than checkpoint-1000")
def run_without_a_state(artifact: Artifact) -> None:
    """Nothing but the times of the files tells that the run was continued."""
    checkpoint(artifact, 1000, top=None)


def goes_on(artifact: Artifact, how: str, **changed: object) -> None:
    """Leave the log and the configuration of a run that went on from `first`, and that adapter beside it.

    Args:
        artifact: The adapter.
        how: What the run did with the adapter: one of `HOW`.
        **changed: Settings that the run has, and the one before it does not.
    """
    home, runs = artifact["folder"].parent, continued_runs()
    shutil.copy(runs / "eval.jsonl", home)
    os.utime(home / "eval.jsonl", (1e9, 1e9))  # older than both adapters
    shutil.copytree(runs / "first" / "adapter", home / "first")
    shutil.copy2(runs / how / "adapter" / "trainer_state.json", artifact["folder"])
    held_out = {"test_datasets": [{"path": "eval.jsonl", "type": "chat_template"}], "base_model": "base"}
    first = configuration(output_dir="first", **held_out)
    second = configuration("first", **{"output_dir": artifact["folder"].name, **held_out, **changed})
    for name, settings in (("first", first), ("second", second)):
        (home / f"{name}.yaml").write_text(yaml.safe_dump(settings))


@mutant("ML456", "N205", says="that of the base alone")
def adapter_dropped_for_a_new_one(artifact: Artifact) -> None:
    """The program made a new adapter after it had loaded the one to go on from."""
    goes_on(artifact, "dropped")


@mutant("ML456", "N205", says="was loaded in part")
def half_of_the_adapter_loaded(artifact: Artifact) -> None:
    """The tensors of one layer have another name in the file, and PEFT leaves them out."""
    goes_on(artifact, "half")


@mutant("ML456", "N205", says="nothing tells whether the rows are the same")
def adapter_dropped_and_other_rows_held_out(artifact: Artifact) -> None:
    """The same with other held-out rows, of which no loss is known: a note with both numbers."""
    goes_on(artifact, "dropped", test_datasets=[{"path": "other.jsonl", "type": "chat_template"}])
