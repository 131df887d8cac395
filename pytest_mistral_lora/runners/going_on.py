"""How a trainer is told to go on from an adapter, and which of its settings decide a held-out loss."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.runners.configuration import is_set, values_in

_FREE = re.compile(
    r"output_dir|overwrite_.*|run_name|logging_.*|report_to|save_.*|saves_per_epoch|resume_.*|plot_loss"
    r"|.*learning_rate|lr_.*|warmup_.*|weight_decay|adam_.*|optim.*|max_grad_norm|num_(train_)?epochs|max_steps"
    r"|gradient_accumulation_steps|per_device_train_batch_size|lora_dropout|eval_steps|evals_per_epoch|eval_on_start"
)
"""Keys that change no held-out loss of a given model. `seed` is none: it can decide which rows are held out."""


@dataclass(frozen=True, slots=True)
class GoingOn:
    """Keys of a trainer's configuration.

    Attributes:
        start: Names the adapter to go on from.
        held_out: Names held-out data; without it, they are split off the training data.
        train: Names the data to train on.
        file: Name of the JSON file in its output that has its settings; empty if it writes none.
    """

    start: str
    held_out: str
    train: str
    file: str = ""

    def start_in(self, settings: Mapping[str, Any]) -> str:
        """Return the adapter that settings go on from; empty without one."""
        value = settings.get(self.start)
        names = value if isinstance(value, list) else str(value).split(",") if is_set(value) else []
        # several are merged but for the last, which is trained on
        return str(names[-1]).strip() if names else ""

    def hold_out_alike(self, first: RunSettings, second: RunSettings) -> bool:
        """Return whether two configurations declare the same held-out rows, encoded and measured in the same way."""
        named = is_set(first.data.get(self.held_out)) and is_set(second.data.get(self.held_out))
        free = {self.start, *([self.train, "seed", "data_seed"] if named else [])}
        keys = {key for key in first.data.keys() | second.data.keys() if not _FREE.fullmatch(key)} - free
        values = ([settings.data.get(key) for settings in (first, second)] for key in sorted(keys))
        return all(one == other and _names_same_files(one, first, second) for one, other in values)


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The settings of a run.

    Attributes:
        file: The file that has them.
        data: Their keys and values.
        before: When the run had ended, in seconds since 1970: a file that is newer may be another one.
    """

    file: Path
    data: Mapping[str, Any]
    before: float


def _names_same_files(value: Any, first: RunSettings, second: RunSettings) -> bool:
    """Return whether the paths in a value lead to the same bytes from both configurations, older than both runs."""
    for text in values_in(value):
        if not isinstance(text, str):
            continue
        paths = [settings.file.parent / text for settings in (first, second)]
        try:
            if any(path.exists() for path in paths) and not _are_same(paths, min(first.before, second.before)):
                return False
        except (OSError, ValueError):  # a text that is no path: too long, or with a null character
            continue
    return True


def _are_same(paths: Iterable[Path], before: float) -> bool:
    first, second = paths
    if not (first.exists() and second.exists()):
        return False
    if not (first.is_file() and second.is_file()):
        return first.samefile(second)  # a folder, such as that of the base
    is_old = max(first.stat().st_mtime, second.stat().st_mtime) <= before
    return is_old and (first.samefile(second) or sha256_file(first) == sha256_file(second))
