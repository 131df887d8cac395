"""The files of an adapter folder, read without trusting them: bounded, inside the folder, and never a pickle."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading.jsonl import read_json
from pytest_mistral_lora.checkpoint.weights import TensorInfo, read_header
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import inside

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TRAINER_STATE = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state(_\d+)?)\.\w+")
_MODEL = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors|adapter_model\.safetensors\.index\.json")


@dataclass(frozen=True)
class Opened:
    """An adapter folder, opened.

    Attributes:
        folder: The folder.
        config: `adapter_config.json`; None if it cannot be used.
        tensors: The header of `adapter_model.safetensors`, by tensor name; None if it cannot be used.
        findings: What is wrong with the files.
    """

    folder: Path
    config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorInfo] | None
    findings: tuple[Finding, ...]

    @property
    def place(self) -> str:
        """The file of the tensors, for findings."""
        return str(self.folder / TENSORS)

    @property
    def config_place(self) -> str:
        """The file of the configuration, for findings."""
        return str(self.folder / CONFIG)


def open_adapter(folder: Path) -> Opened:
    """Read an adapter folder's configuration and the header of its tensors; what cannot be read is a finding."""
    findings = [*_pickles(folder), *_other_weights(folder)]
    config: Mapping[str, Any] | None = None
    tensors: Mapping[str, TensorInfo] | None = None
    try:
        config = read_object(folder, CONFIG)
    except InputError as error:
        findings.append(_unreadable(error, folder))
    try:
        tensors = read_header(inside(folder, TENSORS))
    except InputError as error:
        findings.append(_unreadable(error, folder))
    return Opened(folder, config, tensors, tuple(findings))


def _unreadable(error: InputError, folder: Path) -> Finding:
    rule = "ML406" if "pickle" in error.found else "ML405"
    return Finding(rule, error.found, error.place, error.expected or _where_else(folder))


def _where_else(folder: Path) -> str:
    """Say where the adapter may be: PEFT saves one of another name than `default` in a folder of that name."""
    below = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    hint = f"; there is one in {', '.join(below[:3])}: name that folder" if below else ""
    return f"an adapter: {CONFIG} and {TENSORS}{hint}"


def _pickles(folder: Path) -> Iterator[Finding]:
    for file in sorted(folder.iterdir()):
        if file.suffix in _PICKLES and not _TRAINER_STATE.fullmatch(file.name):
            yield Finding("ML406", "weights in a pickle file: not loaded", str(file), f"safetensors only: {TENSORS}")


def _other_weights(folder: Path) -> Iterator[Finding]:
    for file in sorted(folder.iterdir()):
        if _SHARD.fullmatch(file.name):
            yield Finding("ML405", "a sharded adapter, which PEFT does not load", str(file), f"one file: {TENSORS}")
    if model_files(folder):
        yield Finding(
            "ML418",
            f"full model weights: {', '.join(file.name for file in model_files(folder)[:3])}",
            str(folder),
            "an adapter and nothing else; of a merged model, its manifest.json with kind merged and no adapter",
        )


def model_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a full model in a folder, in name order."""
    return sorted(file for file in folder.iterdir() if _MODEL.fullmatch(file.name))


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of a folder.

    Raises:
        InputError: If the file is not there, is too large, or is not a JSON object in UTF-8.
    """
    file = inside(folder, name)
    data = read_json(file)
    if not isinstance(data, dict):
        raise InputError(f"a JSON {type(data).__name__}", place=str(file), expected="a JSON object")
    return data
