"""The files that a path stands for: a file, a folder, or a configuration of TRL, Axolotl or LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from pytest_mistral_lora.chat.fields import kind_of
from pytest_mistral_lora.chat.formats import CALL
from pytest_mistral_lora.chat.reading import parse_json, read_bounded, read_json
from pytest_mistral_lora.data import Source, source_files
from pytest_mistral_lora.data.messages import Layout
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.schema import error_in_words

_ON_A_HUB = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_LLAMAFACTORY_COLUMNS = {
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
# settings of a data set in Axolotl that change which rows there are, or their text, in a way that is not done here
_AXOLOTL_REFUSED = (
    *("message_field_training_detail", "split_thinking", "shards", "shards_idx", "input_transform"),
    *("input_format", "field_human", "field_model", "conversation"),
)
_AXOLOTL_NO_ROWS = ("completion", "pretrain", "input_output", "stepwise_supervised", "_synthetic")
_AXOLOTL_ROLES = {"human": "user", "gpt": "assistant"}


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
    """The keys of Axolotl's `SFTDataset` and `DPODataset` that are followed here."""

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
    """The keys of LLaMA-Factory's `DatasetAttr` that are followed here."""

    file_name: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    columns: dict[str, str | None] | None = None
    tags: dict[str, str | None] | None = None


def _check(model: type[BaseModel], entry: Any, place: str) -> None:
    """Refuse an entry with a value of another type.

    Raises:
        InputError: With the key and the value.
    """
    try:
        model.model_validate(entry)
    except ValidationError as error:
        found = f"{'.'.join(map(str, (first := error.errors()[0])['loc']))}: {first['input']!r}"[:200]
        raise InputError(found, place=place, expected=error_in_words(first, model).removeprefix("expected ")) from error


def declared_sources(path: Path, names: Collection[str] = ()) -> tuple[list[Source], list[str]]:
    """Return the sources that a path stands for, and remarks on the settings of a configuration that are not taken.

    Args:
        path: A data file, a folder, `dataset_info.json`, or a YAML file of TRL, Axolotl or LLaMA-Factory.
        names: Data sets to take from a `dataset_info.json`; all if it has one.

    Raises:
        InputError: If there is no such file, or a declaration cannot be followed.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        return _of_yaml(path, names)
    if path.is_file() and path.suffix == ".json" and "dataset_info" in path.name:
        info = read_json(path)
        if isinstance(info, Mapping) and all(isinstance(one, Mapping) for one in info.values()):
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
        raise InputError(f"is {kind_of(config)}", place=str(path), expected="a configuration of Axolotl")
    if isinstance(config.get("datasets"), list):
        return _of_axolotl(path, config)
    if isinstance(config.get("dataset_name"), str):
        # the formats of TRL are recognised by their keys
        split = str(config.get("dataset_train_split") or "train")
        return [Source(file) for file in source_files(_found(path, config["dataset_name"]), split)], []
    if config.get("tokenized_path"):
        raise InputError("tokenized_path: encoded rows", place=str(path), next_step="Import the data they come from.")
    named = config.get("dataset")
    if isinstance(named, str | list):
        wanted = names or (named.split(",") if isinstance(named, str) else named)
        folder = _found(path, str(config.get("dataset_dir", "data")))
        info = folder / "dataset_info.json"
        sources, remarks = _of_dataset_info(
            info, parse_json(read_bounded(info), info), [str(one).strip() for one in wanted]
        )
        settings = [
            f"{key}: {config[key]}" for key in ("mask_history", "train_on_prompt", "max_samples") if config.get(key)
        ]
        return sources, [*remarks, *(f"{one} of {path} is a setting of training, not of rows" for one in settings)]
    if "base" in config and "data" in config:
        raise InputError("this is a recipe of mistral-lora", place=str(path), next_step="Name its data.train instead.")
    keys = ", ".join(map(str, list(config)[:8]))
    expected = "`datasets` of Axolotl, or `dataset` of LLaMA-Factory"
    raise InputError(f"no data is declared (keys {keys})", place=str(path), expected=expected)


def _found(config: Path, name: str) -> Path:
    """Return a path of a configuration: trainers read it from the working directory; here also beside the file."""
    path = Path(name)
    return path if path.exists() or path.is_absolute() else config.parent / name


def _of_dataset_info(path: Path, info: Mapping[str, Any], names: Collection[str]) -> tuple[list[Source], list[str]]:
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
        place = f"{path}, {name}"
        entry = info.get(name)
        if entry is None:
            raise InputError("no such data set", place=place, expected=f"one of {', '.join(info)}")
        _check(_LlamaFactoryEntry, entry, place)
        if "file_name" not in entry or any(key in entry for key in _ON_A_HUB):
            step = "Download it, and declare its `file_name`."
            raise InputError("is not a file of this machine", place=place, next_step=step)
        if entry.get("num_samples"):
            raise InputError(f"num_samples {entry['num_samples']} draws rows at random", place=place)
        layout = _llamafactory_layout(entry, place)
        sources += [Source(file, layout) for file in source_files(path.parent / str(entry["file_name"]))]
    return sources, []


def _llamafactory_layout(entry: Mapping[str, Any], place: str) -> Layout:
    """Return the layout of an entry as `DatasetAttr.join` of LLaMA-Factory reads it."""
    family = "alpaca" if entry.get("formatting", "alpaca") == "alpaca" else "sharegpt"
    columns = entry.get("columns")
    keys = dict(_LLAMAFACTORY_COLUMNS[family])
    if columns is not None:
        # a column that is not declared beside others is none, not the default
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
    )


def _of_axolotl(path: Path, config: Mapping[str, Any]) -> tuple[list[Source], list[str]]:
    sources: list[Source] = []
    remarks: list[str] = []
    if config.get("train_on_inputs"):
        remarks.append(f"train_on_inputs of {path}: rows train on answers only")
    for index, entry in enumerate(config["datasets"]):
        place = f"{path}, datasets[{index}]"
        _check(_AxolotlEntry, entry, place)
        for key in _AXOLOTL_REFUSED:
            if entry.get(key):
                raise InputError(f"{key}: {entry[key]!r} is not followed", place=place, expected=f"no {key}")
        if entry.get("train_on_eos") in ("last", "none", "all"):
            remarks.append(f"train_on_eos: {entry['train_on_eos']} of {place}: rows train on the EOS of each answer")
        layout = _axolotl_layout(entry, place, is_preference=bool(config.get("rl")))
        if layout.format == "alpaca" and layout.templates is None:
            remarks.append(f"the prompt text that Axolotl puts around {entry.get('type')} ({place}) is left out")
        named = entry.get("data_files") or entry.get("path")
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, Sequence) or not names:
            raise InputError("no `path`", place=place, expected="a file or folder of this machine")
        for name in map(str, names):
            inside = Path(str(entry.get("path", "")), name)
            name = str(inside) if entry.get("data_files") and inside.exists() else name
            sources += [Source(file, layout) for file in source_files(_found(path, name))]
    return sources, remarks


def _axolotl_layout(entry: Mapping[str, Any], place: str, *, is_preference: bool) -> Layout:
    kind = entry.get("type") or "chat_template"
    if isinstance(kind, Mapping):
        return Layout(
            "alpaca",
            {
                "instruction": kind.get("field_instruction") or "instruction",
                "input": kind.get("field_input") or "input",
                "output": kind.get("field_output") or "output",
                "system": kind.get("field_system") or "system",
                "history": "",
            },
            # Axolotl's defaults, with their spaces
            templates=(kind.get("format") or "{instruction} {input} ", kind.get("no_input_format") or "{instruction} "),
            system=kind.get("system_prompt") or "",
        )
    family = str(kind).partition(".")[0].partition(":")[0]
    if family in _AXOLOTL_NO_ROWS:
        raise InputError(f"type {kind}: a text without turns", place=place, expected="chat_template or alpaca")
    if family == "alpaca_chat" and str(kind).endswith("load_qa"):
        return Layout("prompt-completion", {"prompt": "question", "completion": "answer"})
    if family in ("alpaca", "alpaca_chat", "alpaca_instruct", "alpaca_w_system", "gpteacher"):
        output = "response" if family == "gpteacher" else "output"
        return Layout("alpaca", {"instruction": "instruction", "input": "input", "output": output, "history": ""})
    if family not in ("chat_template", "sharegpt", "messages") and not is_preference:
        known = "chat_template, alpaca, alpaca_chat.load_qa, gpteacher or fields of your own"
        raise InputError(f"type {kind!r}", place=place, expected=known)
    mapped = dict(entry.get("message_property_mappings") or {})
    role = mapped.pop("role", None) or entry.get("message_field_role")
    content = mapped.pop("content", None) or entry.get("message_field_content")
    thinking = entry.get("field_thinking") or mapped.pop("reasoning_content", None)
    weight = entry.get("message_field_training")
    given = {"role": role, "content": content, "thinking": thinking, "weight": weight}
    roles = {one: ours for ours, theirs in (entry.get("roles") or {}).items() for one in theirs}
    trained = entry.get("roles_to_train")
    messages = entry.get("field_messages") or ("conversations" if family == "sharegpt" else "messages")
    keys = {"messages": messages}
    keys |= {name: entry[f"field_{name}"] for name in ("system", "tools") if entry.get(f"field_{name}")}
    if is_preference:
        keys |= {"prompt": messages, "chosen": entry.get("field_chosen") or "chosen"}
        keys |= {"rejected": entry.get("field_rejected") or "rejected"}
    return Layout(
        "preference" if is_preference else "messages",
        keys,
        {ours: theirs for ours, theirs in {**mapped, **given}.items() if theirs},
        roles,
        trained=None if trained is None else frozenset(roles.get(one, _AXOLOTL_ROLES.get(one, one)) for one in trained),
        drop_system=bool(entry.get("drop_system_message")),
        joined=True,
    )
