"""The configurations of LLaMA-Factory, and the `dataset_info.json` that describes its data sets, as sources of rows."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.foreign_fields import CALL
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.trainers.llamafactory.entry import LlamaFactoryEntry
from pytest_mistral_lora.field.trainers.llamafactory.going_on import GOING_ON
from pytest_mistral_lora.formats.convert import Source
from pytest_mistral_lora.formats.files import source_files
from pytest_mistral_lora.formats.importers import (
    START_REMARK,
    Importer,
    declared_path,
    declared_split,
    is_yaml,
    remarks_on,
    require_form,
)
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.places import Place

_ON_A_HUB = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_TRAINING = ("mask_history", "train_on_prompt", "max_samples", "mix_strategy", "cutoff_len")
_ROLES_IN = "`tags` of LLaMA-Factory's dataset_info.json"
_COLUMNS = {
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output"},
    "sharegpt": {"messages": "conversations"},
}
_COLUMN_NAMES = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "mark"}
_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", CALL),
    "system_tag": ("system", "system"),
}


class LlamaFactoryImporter(Importer):
    """A YAML file that names data sets in `dataset`, or the `dataset_info.json` that describes them."""

    title, model_key, rows_key = "LLaMA-Factory", "model_name_or_path", "dataset"
    own_keys = frozenset(
        {"dataset", "stage", "finetuning_type", "template", "dataset_dir", "cutoff_len", "tokenized_path"}
    )
    names_in, json_files = "a dataset_info.json", "*dataset_info*.json"

    def declares_rows(self, path: Path, config: Mapping[Any, Any]) -> bool:
        """Return whether a YAML file names data sets or encoded rows, or a JSON file describes data sets."""
        if is_yaml(path):
            return isinstance(config.get("dataset"), str | list) or bool(config.get("tokenized_path"))
        return all(isinstance(entry, Mapping) for entry in config.values())

    def sources(self, path: Path, config: Mapping[Any, Any], names: Collection[str]) -> tuple[list[Source], list[str]]:
        """Return the files of the named data sets, and remarks on settings of training."""
        if not is_yaml(path):
            return _described(path, config, names), []
        if config.get("tokenized_path"):
            step = "Import the data they come from."
            raise InputError("tokenized_path: encoded rows", place=str(path), next_step=step)
        named = config["dataset"]
        wanted = names or (named.split(",") if isinstance(named, str) else named)
        info = declared_path(path, str(config.get("dataset_dir") or "data")) / "dataset_info.json"
        sources = _described(info, read_json(info), [str(name).strip() for name in wanted])
        remarks = remarks_on(path, config, _TRAINING, "is a setting of training, not of rows")
        remarks += remarks_on(path, config, ("eval_dataset",), "is not imported")
        return sources, [*remarks, *remarks_on(path, config, (GOING_ON.start,), START_REMARK)]

    def answer(self, path: Path, config: Mapping[Any, Any], runner: str) -> tuple[str, str] | None:
        """Return what a configuration or a description of data sets is, and the commands that read it."""
        entries = [value for value in config.values() if isinstance(value, Mapping)]
        is_described = any({"file_name", "hf_hub_url"} & entry.keys() for entry in entries)
        if not is_described or len(entries) < len(config):
            return super().answer(path, config, runner)
        name = next((key for key, value in config.items() if "file_name" in value), next(iter(config)))
        words = ["mistral-lora", "import", str(path), "--dataset", str(name), "--to", "rows.jsonl"]
        return "a dataset_info.json of LLaMA-Factory", f"Convert a data set of it: {shlex.join(words)}"


LLAMAFACTORY = LlamaFactoryImporter()


def _described(path: Path, info: Any, names: Collection[str]) -> list[Source]:
    """Return the files of some data sets of a `dataset_info.json`; of the only one with a file, if none is named.

    Raises:
        InputError: If it does not describe data sets, or not these, or one is not a file of this machine.
    """
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
        require_form(LlamaFactoryEntry, entry, place)
        if "file_name" not in entry or any(key in entry for key in _ON_A_HUB):
            step = "Download it, and declare its `file_name`."
            raise InputError("is not a file of this machine", place=place, next_step=step)
        if entry.get("num_samples"):
            raise InputError(f"num_samples {entry['num_samples']} draws rows at random", place=place)
        layout = _layout(entry, place)
        files = source_files(path.parent / str(entry["file_name"]), declared_split(entry, "split", place))
        sources += [Source(file, layout) for file in files]
    return sources


def _layout(entry: Mapping[str, Any], place: Place) -> Layout:
    """Return the layout of an entry of `dataset_info.json` as `DatasetAttr.join` of LLaMA-Factory reads it.

    Raises:
        InputError: If the entry declares no response.
    """
    family = "alpaca" if entry.get("formatting", "alpaca") == "alpaca" else "sharegpt"
    columns = entry.get("columns")
    keys = dict(_COLUMNS[family])
    if columns is not None:
        # beside declared columns, an undeclared one is missing, and not the default
        keys = {**dict.fromkeys(("instruction", "input", "output", "history", "messages", "system", "tools"), "")}
        keys |= {_COLUMN_NAMES.get(name, name): column for name, column in columns.items() if column}
    else:
        keys |= {"history": "", "system": "", "tools": ""}
    if family == "alpaca" and not (keys.get("output") or entry.get("ranking")):
        raise InputError(
            "no response is declared: a text without turns", place=place, expected="columns with a response"
        )
    if entry.get("ranking"):
        keys |= {"prompt": keys.get("instruction" if family == "alpaca" else "messages", "")}
        keys |= {name: keys.get(name) or name for name in ("chosen", "rejected")}
    tags = entry.get("tags")
    named = {tag: (tags.get(tag) if tags is not None else default) for tag, (default, _) in _TAGS.items()}
    role, content = ("from", "value") if tags is None else (tags.get("role_tag"), tags.get("content_tag"))
    is_chat = family == "sharegpt"
    return Layout(
        "preference" if entry.get("ranking") else family,
        keys,
        {"role": role, "content": content} if is_chat and role and content else {},
        {given: _TAGS[tag][1] for tag, given in named.items() if given} if is_chat else {},
        joined=True,
        roles_in=_ROLES_IN if is_chat else "",
    )
