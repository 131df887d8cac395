"""The part of a trainer's configuration that its script gets: no key that names code, a network or an upload.

A configuration may come from somebody else, and a trainer follows it: it imports files, fetches, and uploads. So a
script gets the keys of `keys.toml` alone, and of their values only what names no code. The user's `--allow-code` hands
the file over unchanged.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pytest_mistral_lora.chat.reading import parse_json, read_bounded
from pytest_mistral_lora.errors import InputError, RunnerError
from pytest_mistral_lora.places import Place

_KEYS = Path(__file__).with_name("keys.toml")
_DEEPEST = 32
_MOST_VALUES = 50_000
_MOST_BYTES = 1 << 20

# Axolotl imports a dotted name from anywhere: `load` in
# https://github.com/axolotl-ai-cloud/axolotl/blob/main/src/axolotl/prompt_strategies/__init__.py
_AXOLOTL_TYPES = re.compile(
    r"(alpaca|alpaca_chat|alpaca_instruct|alpaca_w_system|chat_template|completion|context_qa|creative_acr|input_output"
    r"|llama2_chat|messages|metharme|orcamini|pretrain|pygmalion|sharegpt|stepwise_supervised|user_defined)(\.load_\w+)?"
    r"|messages\.chat|(chat_template|chatml|llama3|zephyr|passthrough|user_defined)\.(?!load)\w+"
)
_AXOLOTL_ENTRY = re.compile(
    r"type|chat_template(_jinja)?|conversation|input_format|field(_\w+)?|message_\w+|template_thinking_key|split_thinking"
    r"|roles(_to_train)?|train_on_(eos|eot)|drop_system_message|format|no_input_format|system_(prompt|format)"
    r"|(prompt|chosen|rejected|completion)_format|step_separator|train_on_last_step_only|max_completion_length"
)
_AXOLOTL_DATA = re.compile(r"path|data_files|ds_type|split|name")
# bounded, since each `For` in a name of a megabyte would be tried as its middle
_CLASS = re.compile(r"(Auto|[A-Z]\w{0,80})?(Tokenizer(Fast)?|For\w{1,80}|LMHeadModel)")
_MODEL_ARGS = re.compile(
    r"backend|truncation|max_length|add_bos_token|prefix_token_id|use_fast_tokenizer|chat_template_args|enable_thinking"
    r"|think_end_token|logits_cache|softmax_dtype|batch_size|max_batch_size|trust_remote_code|pretrained|tokenizer|revision"
    r"|subfolder|dtype|device|device_map|parallelize|peft|delta|autogptq|gptqmodel|gguf_file"
)
_TASK = re.compile(r"[\w.*?,:+|-]+")
# parsers of addresses drop white space and control characters in front, and newlines and tabs anywhere
_REMOTE = re.compile(r"[\x00-\x20]*([A-Za-z][\w+.\t\r\n-]*(:[\t\r\n]*/[\t\r\n]*/|::)|REMOTE:|ONLINE\s*$)")
_NAMES_CODE = re.compile(r".*(plugin|callback|remote_code|script|hub|url|secret|password|api_key|auth_token)s?")


@dataclass
class Configuration:
    """The configuration that a script gets.

    Attributes:
        data: Its keys and values.
        left_out: The keys that may name code, a network or an upload, or that are not known here.
    """

    data: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def note(self) -> str:
        """A line about the keys that were left out; empty without one."""
        if not self.left_out:
            return ""
        return (
            f"left out of the configuration: {', '.join(self.left_out)} (may name code, a network or an upload, or is "
            "not known; if you trust the file, --allow-code, in pytest --mistral-allow-code, uses it unchanged)"
        )


def safe_configuration(name: str, file: Path, *, own_data: bool = False) -> Configuration:
    """Return what a packaged runner gets of a configuration.

    Args:
        name: The runner's name.
        file: The configuration.
        own_data: Whether the runner keeps the data that the configuration names.

    Raises:
        RunnerError: If the file is not plain YAML within bounds, or names code that ids and labels can depend on.
    """
    data, lines = read_configuration(file)
    keys = _keys()[name]
    made = Configuration()
    for key, value in data.items():
        if keys.refused.fullmatch(key) and _is_set(value):
            raise _refusal(file, lines, key, f"`{key}: {_short(value)}` names code, on which ids and labels can depend")
        if keys.own_data.fullmatch(key):
            if own_data:
                _refuse_remote(value, file, lines, key)
                made.data[key] = value
        elif keys.kept.fullmatch(key):
            made.data[key] = _without_code(value, key, made.left_out)
        elif _is_set(value) and not keys.quiet.fullmatch(key):
            made.left_out.append(key)
    _refuse_code_in_values(name, made, file, lines, own_data=own_data)
    return made


@dataclass(frozen=True, slots=True)
class _Keys:
    kept: re.Pattern[str]
    own_data: re.Pattern[str]
    refused: re.Pattern[str]
    quiet: re.Pattern[str]


@cache
def _keys() -> Mapping[str, _Keys]:
    table: dict[str, Any] = tomllib.loads(_KEYS.read_text(encoding="utf-8"))
    quiet = _any_of(table.pop("quiet"))
    return {
        name: _Keys(
            kept=_any_of(keys["kept"]),
            own_data=_any_of(keys.get("own_data", "")),
            refused=_any_of(keys.get("refused", "")),
            quiet=quiet,
        )
        for name, keys in table.items()
    }


def _any_of(words: str) -> re.Pattern[str]:
    # without a word, nothing matches
    return re.compile("|".join(words.split()) or r"(?!)")


def _is_set(value: Any) -> bool:
    """Return whether a value asks for anything: `push_to_hub: false` and `report_to: none` do not."""
    return value not in (None, False, "", "none", [], {})


def _short(value: Any) -> str:
    return f"{value!r:.80}" if not isinstance(value, str) else f"{value:.80}"


def _refusal(file: Path, lines: Mapping[str, int], key: str, found: str) -> RunnerError:
    step = "Leave it out; if you trust the file, --allow-code (in pytest --mistral-allow-code) uses it unchanged."
    return RunnerError(found, place=Place.of(file, line=lines.get(key)) / key, next_step=step)


def read_configuration(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the keys and values of a YAML file, and the line of each key at its top.

    Raises:
        RunnerError: If it is not plain YAML with text keys, or is too large.
    """
    place = Place.of(file)
    try:
        content = read_bounded(file)
        if len(content) > _MOST_BYTES:
            raise RunnerError(f"has more than {_MOST_BYTES:,} bytes", place=place, expected="a configuration")
        text = content.decode("utf-8-sig")
        depth = 0
        # PyYAML composes recursively, but reads events in a loop
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise RunnerError(f"more than {_DEEPEST} levels deep", place=place, expected="a configuration")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_merges(node, place)
        data = yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        mark = error.problem_mark
        found = f"not plain YAML: {error.problem or error}"
        expected = "plain values: a tag such as !function or !!python names code"
        raise RunnerError(
            found, place=replace(place, line=mark.line + 1) if mark else place, expected=expected
        ) from error
    # a date that does not exist, an integer of thousands of digits, or a list as a key
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunnerError(f"not valid YAML: {' '.join(str(error).split()):.200}", place=place) from error
    except InputError as error:
        raise RunnerError(error.found, place=error.place, expected="a configuration") from error
    if data is None:
        return {}, {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RunnerError("no keys at its top", place=place, expected="a mapping of names to values")
    # aliases of aliases turn a few lines into millions of values, and an alias may hold itself
    if sum(1 for _ in _values(data, _MOST_VALUES)) > _MOST_VALUES:
        found = f"more than {_MOST_VALUES:,} values, aliases included"
        raise RunnerError(found, place=place, expected="a configuration")
    return data, {key.value: key.start_mark.line + 1 for key, _ in getattr(node, "value", ())}


def _refuse_merges(node: yaml.Node | None, place: Place) -> None:
    """Refuse mappings that merge others (`<<`) into too many keys: PyYAML copies them before anybody can count.

    Raises:
        RunnerError: If a mapping would have more keys than a configuration, or merges itself.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: tuple[int, ...] = ()) -> int:
        if id(node) in above:
            raise RunnerError(
                "refers to itself", place=replace(place, line=node.start_mark.line + 1), expected="plain values"
            )
        if id(node) not in sizes:
            inner = (*above, id(node))
            if isinstance(node, yaml.MappingNode):
                merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
                sizes[id(node)] = len(node.value) + sum(size(value, inner) for value in merged)
                for key, value in node.value:
                    size(key, inner)
                    size(value, inner)
            elif isinstance(node, yaml.SequenceNode):
                sizes[id(node)] = sum(size(value, inner) for value in node.value)
            else:
                sizes[id(node)] = 1
        if sizes[id(node)] > _MOST_VALUES:
            found = f"more than {_MOST_VALUES:,} values, aliases included"
            raise RunnerError(found, place=replace(place, line=node.start_mark.line + 1), expected="a configuration")
        return sizes[id(node)]

    if node is not None:
        size(node)


def _values(value: Any, most: int) -> Iterator[Any]:
    """Yield each value within a value, at most one more than a number."""
    waiting, seen = [value], 0
    while waiting and seen <= most:
        value = waiting.pop()
        seen += 1
        yield value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value


def _without_code(value: Any, path: str, left_out: list[str]) -> Any:
    """Return a value without the keys in it that name code, a network or a secret; their paths go to a list."""
    if isinstance(value, list):
        return [_without_code(item, f"{path}[{index}]", left_out) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if _NAMES_CODE.fullmatch(str(key)):
            left_out += [f"{path}.{key}"] if _is_set(item) else ()
        else:
            kept[key] = _without_code(item, f"{path}.{key}", left_out)
    return kept


def _refuse_remote(value: Any, file: Path, lines: Mapping[str, int], key: str) -> None:
    for text in _values(value, _MOST_VALUES):
        if isinstance(text, str) and _REMOTE.match(text):
            raise _refusal(file, lines, key, f"`{_short(text)}` names a network")
        if isinstance(text, str) and Path(text).suffix == ".py":
            raise _refusal(file, lines, key, f"`{_short(text)}` names code, on which ids and labels can depend")


def _refuse_code_in_values(
    name: str, made: Configuration, file: Path, lines: Mapping[str, int], *, own_data: bool
) -> None:
    """Refuse the values of keys that a script gets if they name code or a network in a trainer's own way.

    Raises:
        RunnerError: With the key and its line.
    """
    data = made.data
    for key, value in data.items():
        for text in _values(value, _MOST_VALUES):
            # a URL is opened wherever a path is, also of a template
            if isinstance(text, str) and _REMOTE.match(text) and " " not in text.strip():
                raise _refusal(file, lines, key, f"`{_short(text)}` names a network")
            # ms-swift gets its configuration as words of a command line, where such a value is an option
            if name == "ms-swift" and isinstance(text, str) and text.lstrip().startswith("-"):
                raise _refusal(file, lines, key, f"`{_short(text)}` would be an option of the command line")
    if name == "axolotl":
        _refuse_axolotl_types(made, file, lines, own_data=own_data)
        for key in ("tokenizer_type", "model_type"):
            if key in data and not (isinstance(data[key], str) and _CLASS.fullmatch(data[key])):
                raise _refusal(file, lines, key, f"`{_short(data[key])}` is no class of a tokenizer or a model")
    if name == "llamafactory":
        # first the folder that the script will read
        data |= _beside(data, file)
        _refuse_described_code(data, file, lines, own_data=own_data)
    if name == "lm-eval":
        _refuse_task_files(data, file, lines)
        if "model_args" in data:
            data["model_args"] = _known_model_args(data["model_args"], made.left_out)


def _refuse_axolotl_types(made: Configuration, file: Path, lines: Mapping[str, int], *, own_data: bool) -> None:
    entries = made.data.get("datasets")
    if entries is None:
        return
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _refusal(file, lines, "datasets", f"`{_short(entries)}` is no list of datasets")
    kept = []
    for index, entry in enumerate(entries):
        kind = entry.get("type")
        is_known = kind is None or isinstance(kind, dict) or (isinstance(kind, str) and _AXOLOTL_TYPES.fullmatch(kind))
        if not is_known:
            found = f"`datasets[{index}].type: {_short(kind)}` names code, on which ids and labels can depend"
            raise _refusal(file, lines, "datasets", found)
        named = {key: value for key, value in entry.items() if _AXOLOTL_DATA.fullmatch(str(key))}
        if own_data:
            _refuse_remote(list(named.values()), file, lines, "datasets")
        known = {key: value for key, value in entry.items() if _AXOLOTL_ENTRY.fullmatch(str(key))}
        if isinstance(kind, dict):
            known["type"] = {key: value for key, value in kind.items() if _AXOLOTL_ENTRY.fullmatch(str(key))}
            unknown = [key for key in kind if key not in known["type"] and _is_set(kind[key])]
            made.left_out += [f"datasets[{index}].type.{key}" for key in unknown]
        made.left_out += [
            f"datasets[{index}].{key}" for key in entry if key not in known and key not in named and _is_set(entry[key])
        ]
        # without own data the script needs no path, and one may be of the Hub
        kept.append({**known, **(named if own_data else {})})
    made.data["datasets"] = kept


_DESCRIBED = ("script_url", "hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name")


def _refuse_described_code(data: Mapping[str, Any], file: Path, lines: Mapping[str, int], *, own_data: bool) -> None:
    """Refuse a dataset that LLaMA-Factory's `dataset_info.json` describes as a script or as one of a network."""
    folder = data.get("dataset_dir", "data")
    if not own_data or not isinstance(folder, str):
        return
    described = Path(folder, "dataset_info.json")
    try:
        info = parse_json(read_bounded(described), described) if os.path.isfile(described) else {}  # noqa: PTH113
    except InputError as error:
        raise RunnerError(error.found, place=error.place) from error
    names = data.get("dataset") or ""
    for name in names.split(",") if isinstance(names, str) else names if isinstance(names, list) else [names]:
        entry: Any = info.get(str(name).strip()) if isinstance(info, dict) else None
        for key in _DESCRIBED if isinstance(entry, dict) else ():
            if entry.get(key):
                found = f"{described}: {name!r} has `{key}: {_short(entry[key])}`, which names code or a network"
                raise _refusal(file, lines, "dataset", found)


def _beside(data: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return the folder of LLaMA-Factory's descriptions if it is beside the configuration, where its script looks."""
    folder = data.get("dataset_dir", "data")
    if not isinstance(folder, str) or _has_descriptions(Path(folder)):
        return {}
    beside = file.absolute().parent / folder
    return {"dataset_dir": str(beside)} if _has_descriptions(beside) else {}


def _has_descriptions(folder: Path) -> bool:
    # unlike that of a Path, it is False for a name that is too long
    return os.path.isfile(folder / "dataset_info.json")  # noqa: PTH113


def _refuse_task_files(data: Mapping[str, Any], file: Path, lines: Mapping[str, int]) -> None:
    """Refuse tasks of files: their `!function`, classes and Jinja templates without a sandbox are code."""
    tasks = data.get("tasks") or []
    for task in tasks.split(",") if isinstance(tasks, str) else tasks if isinstance(tasks, list) else [tasks]:
        is_name = isinstance(task, str) and _TASK.fullmatch(task.strip()) and not os.path.lexists(task.strip())
        if not is_name or task.strip().endswith((".yaml", ".yml", ".json", ".py")):
            found = f"`tasks: {_short(task)}` is no name of a task of lm-eval, and the file of a task names code"
            raise _refusal(file, lines, "tasks", found)


def _known_model_args(given: Any, left_out: list[str]) -> Any:
    """Return the arguments of lm-eval's model that change no more than ids: a mapping, or a text such as `a=b,c=d`."""
    parts = dict(part.partition("=")[::2] for part in given.split(",")) if isinstance(given, str) else given
    if not isinstance(parts, dict):
        return {}
    left_out += [f"model_args.{key}" for key in parts if not _MODEL_ARGS.fullmatch(str(key).strip()) and _is_set(key)]
    kept = {key: value for key, value in parts.items() if _MODEL_ARGS.fullmatch(str(key).strip())}
    return ",".join(f"{key}={value}" for key, value in kept.items()) if isinstance(given, str) else kept
