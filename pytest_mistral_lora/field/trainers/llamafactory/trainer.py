"""LLaMA-Factory: how its own code is run, and which values of its configuration name code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.objective import Declaration, Objective
from pytest_mistral_lora.chat.reading import parse_json, read_bounded
from pytest_mistral_lora.errors import InputError, RunnerError
from pytest_mistral_lora.field.trainers.llamafactory.going_on import GOING_ON
from pytest_mistral_lora.runners.configuration import Reading, as_written, short
from pytest_mistral_lora.runners.tasks import PreferenceTasks
from pytest_mistral_lora.runners.trainer import Trainer


class LlamaFactory(Trainer):
    """LLaMA-Factory.

    With `use_dft_loss` it weighs the loss of each token by its probability, which the guard knows as a loss of labels.
    """

    def declares(self, settings: Mapping[str, Any]) -> Declaration | None:
        """Return what `mask_history` or `train_on_prompt` declares.

        By 0.9.5, `data/processor/supervised.py`: `mask_history` trains on the response of the last pair of a prompt and
        a response. A tool result is a prompt, so this is the last turn, also where calls come before it. Both together
        are refused by `hparams/data_args.py`.
        """
        if settings.get("mask_history"):
            return Declaration(Objective("last-answer"), f"mask_history: {as_written(settings['mask_history'])}")
        if settings.get("train_on_prompt"):
            return Declaration(Objective("everything"), f"train_on_prompt: {as_written(settings['train_on_prompt'])}")
        return None

    def require_no_code(self, reading: Reading) -> None:
        """Refuse a dataset that is described as a script or as one of a network."""
        # first the folder that the script will read
        reading.made.data |= _beside(reading.made.data, reading.file)
        _refuse_described_code(reading)


_DESCRIBED = ("script_url", "hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name")


def _refuse_described_code(reading: Reading) -> None:
    """Refuse a dataset that `dataset_info.json` describes as a script or as one of a network."""
    data = reading.made.data
    folder = data.get("dataset_dir", "data")
    if not reading.own_data or not isinstance(folder, str):
        return
    described = Path(folder, "dataset_info.json")
    try:
        info = parse_json(read_bounded(described), described) if _has_descriptions(Path(folder)) else {}
    except InputError as error:
        raise RunnerError(error.found, place=error.place) from error
    names = data.get("dataset") or ""
    for name in names.split(",") if isinstance(names, str) else names if isinstance(names, list) else [names]:
        entry: Any = info.get(str(name).strip()) if isinstance(info, dict) else None
        for key in _DESCRIBED if isinstance(entry, dict) else ():
            if entry.get(key):
                found = f"{described}: {name!r} has `{key}: {short(entry[key])}`, which names code or a network"
                raise reading.refusal("dataset", found)


def _beside(data: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return the folder of descriptions if it is beside the configuration, where its script looks."""
    folder = data.get("dataset_dir", "data")
    if not isinstance(folder, str) or _has_descriptions(Path(folder)):
        return {}
    beside = file.absolute().parent / folder
    return {"dataset_dir": str(beside)} if _has_descriptions(beside) else {}


def _has_descriptions(folder: Path) -> bool:
    return os.path.isfile(folder / "dataset_info.json")  # noqa: PTH113, Path raises for a name that is too long


_CONFIGS = {"dpo": "llamafactory-pairs", "rm": "llamafactory-pairs", "kto": "llamafactory-rated"}

LLAMAFACTORY = LlamaFactory.packaged(
    Path(__file__).parent,
    "llamafactory",
    "LLaMA-Factory",
    "llamafactory",
    "llamafactory-cli train",
    tasks=PreferenceTasks(("dpo", "rm"), ("kto",), key="stage", configs=_CONFIGS),
    importer="pytest_mistral_lora.field.trainers.llamafactory.importer:LLAMAFACTORY",
    exporter="pytest_mistral_lora.field.trainers.llamafactory.export:LLAMAFACTORY",
    going_on=GOING_ON,
    variables={"DISABLE_VERSION_CHECK": "0"},
)
