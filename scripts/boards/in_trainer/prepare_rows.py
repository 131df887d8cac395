"""Let a trainer prepare rows by its own command, and keep the folders that it writes.

It is imported in the trainer's own environment, in place of its extraction script, for
`python scripts/scoreboards.py record prepared --trainer NAME`. Its own output has no ids.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import harness

_PREPARED = "prepared"
_OF_TRAINING_ALONE = ("--bf16", "--fp16", "--report_to", "--check_model")
"""Options of `swift sft` that `swift export` refuses, each with one value."""


def _trl(task: harness.Task) -> Path:
    """Save the dataset of the `SFTTrainer`, as the last line of a user's script does."""
    import trl_rows

    folder = task.folder / _PREPARED
    trl_rows.ready_trainer(task).train_dataset.save_to_disk(folder)
    return folder


def _axolotl(task: harness.Task) -> Path:
    """Run `axolotl preprocess`, which writes `dataset_prepared_path`."""
    import axolotl_rows

    axolotl_rows.encode(task)
    return task.folder / _PREPARED


def _llamafactory(task: harness.Task) -> Path:
    """Run `llamafactory-cli train` with a `tokenized_path`, which it writes before it trains."""
    import llamafactory_rows

    llamafactory_rows.stand_in_for_torchaudio()
    folder = task.folder / _PREPARED
    llamafactory_rows.ready_dataset({**llamafactory_rows.configuration(task), "tokenized_path": str(folder)})
    return folder


def _ms_swift(task: harness.Task) -> Path:
    """Run `swift export --to_cached_dataset true`, which writes `train` into its output folder."""
    import ms_swift_rows
    from swift.pipelines.export import export_main

    ms_swift_rows.keep_marks()
    words = ms_swift_rows.words(task)
    for option in _OF_TRAINING_ALONE:
        at = words.index(option)
        del words[at : at + 2]
    export_main([*words, "--to_cached_dataset", "true"])
    return task.folder / "out"


_PREPARE: dict[str, Callable[[harness.Task], Path]] = {
    "trl": _trl,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "ms-swift": _ms_swift,
}


def main(name: str, folder: str) -> None:
    """Prepare the rows, and keep each folder that is written.

    Args:
        name: The name of the runner.
        folder: A new folder for what it writes. Rows that it refuses in one file are given to it in smaller ones, so
            there may be several folders in it: `0`, `1` and so on. Their column `mistral_lora_row` has the number of
            each row.
    """
    kept = Path(folder)
    kept.mkdir()

    def encode(task: harness.Task) -> list[harness.Encoded]:
        folder = _PREPARE[name](task)
        if any(row["messages"] != harness.PLAIN["messages"] for row in task.rows):
            shutil.copytree(folder, kept / str(len(list(kept.iterdir()))))
        return [(number, {"input_ids": [], "labels": []}) for number in _numbers(folder)]

    harness.main(encode, (name,))


def _numbers(folder: Path) -> list[int]:
    """Return the numbers of the rows in a folder, which may have folders of datasets in it."""
    from datasets import load_from_disk

    found: list[int] = []
    for state in sorted(folder.rglob("state.json")):
        found += load_from_disk(str(state.parent))[harness.MARK]
    return found
