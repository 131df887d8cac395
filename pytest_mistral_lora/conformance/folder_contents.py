"""Which files of a folder the checks read, which they may pass over, and the names of all others.

A file that no rule opens is *not checked*: vocabularies of another library, code, settings of a quantisation. Files
that change neither ids nor weights are passed over in silence, such as a README or the state of an optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.tokenizer_folder import LIMITS, MORE_TEMPLATES
from pytest_mistral_lora.checkpoint.weights import INDEX
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.records.adapter_config import CONFIG
from pytest_mistral_lora.records.manifest import MANIFEST

READ = (
    *LIMITS,
    INDEX,
    "*.safetensors",
    CONFIG,
    "adapter_model.safetensors.index.json",
    MANIFEST,
    "trainer_state.json",
)
"""Names, or patterns of names, of the files that some check reads, of a checkpoint, an adapter or a merged model."""

TRAINER_PICKLES = re.compile(
    r"(optimizer|scheduler|scaler|sampler|training_args|dl_state_dict|rng_state|random_states)(_\d+)?\.\w+"
)
"""Pickle files of transformers' Trainer and of accelerate's `save_state`: no weights, and never opened."""

HARMLESS = (
    ".*",
    "*.md",
    "LICENSE*",
    "NOTICE*",
    "*.png",
    "*.jpg",
    "*.svg",
    "*.webp",
    "*.pdf",
    "*.log",
    "*.yaml",
    "*.yml",
    "*_results.json",
    "trainer_log.jsonl",
    "files.json",
    "*.sig",
    "events.out.tfevents*",
    "requirements.txt",
    "zero_to_fp32.py",
    "latest",
)
"""Patterns of the names of files that decide neither ids nor weights."""

_HARMLESS_FOLDERS = (".*", "checkpoint-*", "global_step*", "runs", "logs", "wandb", MORE_TEMPLATES)
_SHOWN = 8


def unread_files(folder: Path) -> list[str]:
    """Return the names of the files and folders that no check reads, in order; a folder's name ends in `/`."""
    names = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            if not _is_any(entry.name, _HARMLESS_FOLDERS):
                names.append(f"{entry.name}/")
        elif not _is_any(entry.name, (*READ, *HARMLESS)) and not TRAINER_PICKLES.fullmatch(entry.name):
            names.append(entry.name)
    return names


def other_files(folder: Path, manifest: Mapping[str, Any] | None = None) -> Result:
    """Report the files of a folder that no check reads.

    Args:
        folder: The folder of a checkpoint, an adapter or a merged model.
        manifest: The data of its manifest, whose files are checked by their hashes; None without one.
    """
    listed = {f"{name.partition('/')[0]}{'/' * ('/' in name)}" for name in (manifest or {}).get("files", ())}
    names = [name for name in unread_files(folder) if name not in listed]
    if not names:
        return Result()
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return Result(not_checked=f"no rule reads {', '.join(names[:_SHOWN])}{more}")


def _is_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
