"""The files of an adapter folder, read without trusting them: bounded, inside the folder, and never a pickle."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import JSON_LIMIT, inside, json_value, read_json

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8}
_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TRAINER_STATE = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state(_\d+)?)\.\w+")
_MODEL = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors|adapter_model\.safetensors\.index\.json")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor.

    Attributes:
        dtype: Its dtype as safetensors writes it: `F32`, `BF16`, …
        shape: Its shape.
    """

    dtype: str
    shape: tuple[int, ...]


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


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file, and hold every size it gives against the file's own.

    Raises:
        InputError: If it is not a safetensors file, is cut off, or lies about its sizes.
    """
    size, start = file.stat().st_size, _read_start(file)
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise InputError("a pickle under the name of safetensors: not loaded", place=str(file), expected="safetensors")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, JSON_LIMIT):
        found = f"{size} bytes, with a header of {length}" if len(start) == 8 else f"{size} bytes"
        raise InputError(f"not a safetensors file, or cut off: {found}", place=str(file), expected="safetensors")
    with file.open("rb") as content:
        header = json_value(content.read(8 + length)[8:], file)
    return _tensors(header, size - 8 - length, file)


def _read_start(file: Path) -> bytes:
    try:
        with file.open("rb") as content:
            return content.read(8)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", place=str(file)) from error


def _tensors(header: Any, data: int, file: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    ends: list[tuple[int, int]] = []
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                if not name.isprintable():
                    raise ValueError(f"a tensor named {name!r}")
                tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]))
                ends.append(_range(tensors[name], entry["data_offsets"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"a header that is not safetensors': {error!r}", place=str(file)) from error
    at = 0
    for begin, end in sorted(ends):
        if begin != at:
            raise InputError(f"tensors overlap or leave a hole at byte {at} of the data", place=str(file))
        at = end
    if at != data:
        raise InputError(
            f"cut off, or with bytes too many: {data} bytes of data", place=str(file), expected=f"{at}, as it says"
        )
    return tensors


def _range(tensor: TensorInfo, offsets: Any) -> tuple[int, int]:
    begin, end = offsets
    numbers = (begin, end, *tensor.shape)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"sizes {numbers}")
    if (end - begin) * 8 != math.prod(tensor.shape) * _BITS[tensor.dtype]:
        raise ValueError(f"{end - begin} bytes for {tensor.dtype} {list(tensor.shape)}")
    return begin, end
