"""The data files of a path: a file, a folder, or a configuration of TRL, Axolotl or LLaMA-Factory."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from pytest_mistral_lora.chat.fields import kind_of
from pytest_mistral_lora.chat.reading import read_bounded, read_json
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.convert import Source
from pytest_mistral_lora.formats.files import source_files
from pytest_mistral_lora.formats.layouts import Layout, axolotl_layout, llamafactory_layout
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.schema import error_in_words

_ON_A_HUB = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
# Axolotl's settings of a data set that choose rows or change their text; they are not supported here
_AXOLOTL_REFUSED = (
    "message_field_training_detail",
    "split_thinking",
    "shards",
    "shards_idx",
    "preprocess_shards",
    "input_transform",
    "columns",
    "data_dir",
    "input_format",
    "field_human",
    "field_model",
    "conversation",
)
_HELD_OUT = ("test_datasets", "eval_dataset", "dataset_test_split")
_LLAMAFACTORY_TRAINING = ("mask_history", "train_on_prompt", "max_samples", "mix_strategy", "cutoff_len")


class _OwnFields(BaseModel, extra="forbid", strict=True):
    """Axolotl's `UserDefinedPrompterType`."""

    system_prompt: str | None = None
    system_format: str | None = None
    field_system: str | None = None
    field_instruction: str | None = None
    field_input: str | None = None
    field_output: str | None = None
    format: str | None = None
    no_input_format: str | None = None


class _AxolotlEntry(BaseModel, extra="allow", strict=True):
    """The supported keys of Axolotl's `SFTDataset` and `DPODataset`."""

    path: str | None = None
    data_files: str | list[str] | None = None
    type: str | _OwnFields | None = None
    field_messages: str | None = None
    field_system: str | None = None
    field_tools: str | None = None
    field_thinking: str | None = None
    field_chosen: str | None = None
    field_rejected: str | None = None
    message_field_role: str | None = None
    message_field_content: str | None = None
    message_field_training: str | None = None
    message_property_mappings: dict[str, str] | None = None
    roles: dict[str, list[str]] | None = None
    roles_to_train: list[str] | None = None
    train_on_eos: str | None = None
    drop_system_message: bool | None = None


class _LlamaFactoryEntry(BaseModel, extra="allow", strict=True):
    """The supported keys of LLaMA-Factory's `DatasetAttr`."""

    file_name: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    columns: dict[str, str | None] | None = None
    tags: dict[str, str | None] | None = None


def _check(model: type[BaseModel], entry: Any, place: Place) -> None:
    """Refuse an entry with a value of the wrong type.

    Raises:
        InputError: With the key and the value.
    """
    try:
        model.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        found = ": ".join([*filter(None, [".".join(map(str, first["loc"]))]), repr(first["input"])])[:200]
        raise InputError(found, place=place, expected=error_in_words(first, model).removeprefix("expected ")) from error


def declared_sources(path: Path, names: Collection[str] = ()) -> tuple[list[Source], list[str]]:
    """Return the sources of a path, and remarks on the settings of a configuration that are ignored.

    Args:
        path: A data file, a folder, `dataset_info.json`, or a YAML file of TRL, Axolotl or LLaMA-Factory.
        names: Data sets to take from a `dataset_info.json`; all if it has one.

    Raises:
        InputError: If a file is missing, or a declaration is not supported.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        return _of_yaml(path, names)
    if path.is_file() and path.suffix == ".json" and "dataset_info" in path.name:
        info = read_json(path)
        if isinstance(info, Mapping) and all(isinstance(entry, Mapping) for entry in info.values()):
            return _of_dataset_info(path, info, names)
    if names:
        raise InputError(f"declares no data set {', '.join(names)}", place=str(path), expected="a dataset_info.json")
    return [Source(file) for file in source_files(path)], []


def _of_yaml(path: Path, names: Collection[str]) -> tuple[list[Source], list[str]]:
    try:
        config = yaml.safe_load(read_bounded(path).decode())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"not valid YAML: {error}", place=str(path)) from error
    if not isinstance(config, Mapping):
        raise InputError(f"is {kind_of(config)}", place=str(path), expected="a configuration of a trainer")
    if names and not isinstance(config.get("dataset"), str | list):
        raise InputError(f"declares no data set {', '.join(names)}", place=str(path), expected="a dataset_info.json")
    remarks = [f"{key}: {config[key]} of {path} is not imported" for key in _HELD_OUT if config.get(key)]
    if isinstance(config.get("datasets"), list):
        sources, others = _of_axolotl(path, config)
        return sources, [*others, *remarks]
    if isinstance(config.get("dataset_name"), str):
        # the formats of TRL are recognised by their keys
        folder = _found(path, config["dataset_name"])
        return [Source(file) for file in source_files(folder, _split(config, "dataset_train_split", path))], remarks
    if config.get("tokenized_path"):
        raise InputError("tokenized_path: encoded rows", place=str(path), next_step="Import the data they come from.")
    named = config.get("dataset")
    if isinstance(named, str | list):
        wanted = names or (named.split(",") if isinstance(named, str) else named)
        info = _found(path, str(config.get("dataset_dir") or "data")) / "dataset_info.json"
        sources, others = _of_dataset_info(info, read_json(info), [str(name).strip() for name in wanted])
        training = [f"{key}: {config[key]}" for key in _LLAMAFACTORY_TRAINING if config.get(key)]
        others += [f"{setting} of {path} is a setting of training, not of rows" for setting in training]
        return sources, [*others, *remarks]
    if "base" in config and "data" in config:
        raise InputError("this is a recipe of mistral-lora", place=str(path), next_step="Name its data.train instead.")
    keys = ", ".join(map(str, list(config)[:8]))
    expected = "`dataset_name` of TRL, `datasets` of Axolotl, or `dataset` of LLaMA-Factory"
    raise InputError(f"no data is declared (keys {keys})", place=str(path), expected=expected)


def _found(config: Path, name: str) -> Path:
    """Return a path of a configuration: relative to the working directory, as for trainers, or to the file."""
    path = Path(name)
    return path if path.exists() or path.is_absolute() else config.parent / name


def _split(declared: Mapping[str, Any], key: str, place: object) -> str:
    """Return the split that a declaration names.

    Raises:
        InputError: If it is a part of a split, such as `train[:10%]`.
    """
    split = str(declared.get(key) or "train")
    if not re.fullmatch(r"[\w.-]+", split):
        raise InputError(f"{key}: {split!r} is not followed", place=str(place), expected="a whole split, such as train")
    return split


def _of_dataset_info(path: Path, info: Any, names: Collection[str]) -> tuple[list[Source], list[str]]:
    if not isinstance(info, Mapping) or not all(isinstance(entry, Mapping) for entry in info.values()):
        raise InputError("does not declare data sets", place=str(path), expected='{"NAME": {"file_name": …}}')
    local = [name for name, entry in info.items() if "file_name" in entry]
    wanted = list(names) or (local if len(local) == 1 else [])
    if not wanted:
        shown = ", ".join(local[:12]) or "none has a file_name"
        raise InputError(
            f"declares {len(info)} data sets",
            place=str(path),
            next_step=f"Name some (--dataset; `dataset` in a recipe): {shown}",
        )
    sources: list[Source] = []
    for name in wanted:
        place = Place.of(path) / name
        entry = info.get(name)
        if entry is None:
            raise InputError("no such data set", place=place, expected=f"one of {', '.join(info)}")
        _check(_LlamaFactoryEntry, entry, place)
        if "file_name" not in entry or any(key in entry for key in _ON_A_HUB):
            step = "Download it, and declare its `file_name`."
            raise InputError("is not a file of this machine", place=place, next_step=step)
        if entry.get("num_samples"):
            raise InputError(f"num_samples {entry['num_samples']} draws rows at random", place=place)
        layout = llamafactory_layout(entry, place)
        files = source_files(path.parent / str(entry["file_name"]), _split(entry, "split", place))
        sources += [Source(file, layout) for file in files]
    return sources, []


def _of_axolotl(path: Path, config: Mapping[str, Any]) -> tuple[list[Source], list[str]]:
    sources: list[Source] = []
    remarks: list[str] = []
    if config.get("train_on_inputs"):
        remarks.append(f"train_on_inputs of {path}: rows train on answers only")
    for index, entry in enumerate(config["datasets"]):
        place = Place.of(path).within("datasets", index)
        _check(_AxolotlEntry, entry, place)
        for key in _AXOLOTL_REFUSED:
            if entry.get(key):
                raise InputError(f"{key}: {entry[key]!r} is not followed", place=place, expected=f"no {key}")
        if entry.get("train_on_eos") in ("last", "none", "all"):
            remarks.append(f"train_on_eos: {entry['train_on_eos']} of {place}: rows train on the EOS of each answer")
        # TRL's own mixture of data sets has no type: the formats are recognised by their keys
        is_trl = "model_name_or_path" in config and "type" not in entry
        layout = Layout() if is_trl else axolotl_layout(entry, place, is_preference=bool(config.get("rl")))
        if layout.format == "alpaca" and layout.templates is None:
            remarks.append(f"the prompt text that Axolotl puts around {entry.get('type')} ({place}) is left out")
        named = entry.get("data_files") or entry.get("path")
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, Sequence) or not names:
            raise InputError("no `path`", place=place, expected="a file or folder of this machine")
        for name in map(str, names):
            inside = Path(str(entry.get("path", "")), name)
            name = str(inside) if entry.get("data_files") and inside.exists() else name
            files = source_files(_found(path, name), _split(entry, "split", place))
            sources += [Source(file, layout) for file in files]
    if not sources:
        raise InputError("datasets: is empty", place=str(path), expected="an entry with a `path`")
    return sources, remarks
