"""The checks of `adapter_config.json`: is it complete, and can PEFT use it without a risk?"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError, PinError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

_SECONDS = 5.0  # a pattern over the names of a model takes milliseconds; one that backtracks, years
_MOST = 10_000
"""Most names in a list: a name for each layer of the largest models is below 1,000."""

_SHAPING = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "use_dora", "bias", "lora_bias"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("trainable_token_indices", "fan_in_fan_out", "target_parameters", "ensure_weight_tying", "layer_replication"),
)
"""Keys that decide the names, the shapes and the effect of the tensors."""

_TASKS = (None, "CAUSAL_LM")


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _names(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= _MOST and all(isinstance(name, str) for name in value)
    return isinstance(value, str)


def _map_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and len(value) <= _MOST and all(map(check, value.values()))


def _switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _layers(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(one) is int for one in value))


def _copies(value: Any) -> bool:
    pairs = isinstance(value, list) and all(_layers(pair) and len(pair) == 2 for pair in value)
    return pairs and sum(max(0, end - start) for start, end in value) <= _MOST


_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value == "LORA", "LORA"),
    "r": (_whole, "the rank, a whole number above 0"),
    "lora_alpha": (_positive, "the scale, a number above 0"),
    "target_modules": (lambda value: bool(value) and _names(value), "the names of the adapted layers"),
}
"""Required keys. PEFT has a default for a missing one, which need not be the value of training."""

_OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task_type": (lambda value: value in _TASKS, "CAUSAL_LM"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "use_rslora": (_switch, "true or false"),
    "use_dora": (_switch, "true or false"),
    "lora_bias": (_switch, "true or false"),
    "rank_pattern": (_map_of(_whole), "a rank above 0 for each pattern"),
    "alpha_pattern": (_map_of(_positive), "a scale above 0 for each pattern"),
    "modules_to_save": (_names, "names of modules, or null"),
    "layers_to_transform": (_layers, "indices of layers, or null"),
    "layer_replication": (_copies, "pairs of a first layer and the one after the last, or null"),
    "trainable_token_indices": (lambda value: isinstance(value, list | dict), "ids, or null"),
    "layers_pattern": (_names, "a name, or null"),
    "exclude_modules": (_names, "names of modules, or null"),
    "megatron_config": (lambda value: False, "null: PEFT would import a module that the file names"),
}


def configuration_findings(folder: AdapterFolder) -> Iterator[Finding]:
    """Yield the keys of a configuration that are missing, or have a value that no LoRA has."""
    config = folder.config
    for key, (right, expected) in _KEYS.items():
        if key == "target_modules" and config.get("target_parameters"):
            continue
        if key not in config:
            yield Finding("ML408", f"{key} is missing: PEFT takes its own default", str(folder.config_file), expected)
        elif not right(config[key]):
            yield Finding("ML408", f"{key} is {_short(config[key])}", str(folder.config_file), expected)
    for key, (right, expected) in _OPTIONAL.items():
        if config.get(key) is not None and not right(config[key]):
            yield Finding("ML408", f"{key} is {_short(config[key])}", str(folder.config_file), expected)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def lora_config(config: Mapping[str, Any]) -> Any:
    """Return PEFT's `LoraConfig` of the shaping keys alone: others can make PEFT import or decompose something."""
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)}
    kept = {key: config[key] for key in _SHAPING if key in known and config.get(key) is not None}
    return LoraConfig(task_type="CAUSAL_LM", inference_mode=True, **kept)


def target_findings(
    folder: AdapterFolder, modules: Sequence[str], linear: Iterable[str], unmatched: Iterable[tuple[str, str]]
) -> Iterator[Finding]:
    """Yield each name and pattern of a configuration that matches no module: PEFT accepts them without a word.

    Args:
        folder: The adapter.
        modules: Dotted names of every module of the base.
        linear: Those that LoRA can be put on.
        unmatched: Key and pattern of each regular expression that matches none.
    """
    config, place = folder.config, str(folder.config_file)
    targets, have = config.get("target_modules"), sorted({name.rpartition(".")[2] for name in linear})
    # PEFT's own ways to match: a target is whole parts of a name, a saved module is any end of it
    for key, names, mark in (("target_modules", targets, "."), ("modules_to_save", config.get("modules_to_save"), "")):
        for name in names if isinstance(names, list) else []:
            if not any(f"{mark}{module}".endswith(f"{mark}{name}") for module in modules):
                yield Finding("ML409", f"{key} has {name!r}, which matches nothing", place, ", ".join(have))
    layers = config.get("layers_to_transform")
    count = sum(name.rpartition(".")[0].endswith("layers") for name in modules)
    for index in layers if isinstance(layers, list) else [layers]:
        if index is not None and not 0 <= index < count:
            yield Finding("ML409", f"layers_to_transform has {index}", place, f"one of {count} layers")
    for key, pattern in unmatched:
        yield Finding("ML409", f"{key} has {pattern!r}, which matches nothing", place, "a pattern of its layers")


def unmatched_patterns(config: Mapping[str, Any], modules: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield key and pattern of each regular expression that matches no module.

    Raises:
        InputError: As for `matches`.
    """
    patterns: dict[tuple[str, str], str] = {}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str) and config[key] != "all-linear":
            patterns[key, config[key]] = config[key]
    for key in ("rank_pattern", "alpha_pattern"):
        # PEFT matches the end of a name, from a dot on
        patterns |= {(key, one): rf"(.*\.)?({one})" for one in config.get(key) or {}}
    # PEFT puts the index of the layer behind this pattern
    named = config.get("layers_pattern") or []
    for one in [named] if isinstance(named, str) else named:
        patterns["layers_pattern", one] = rf".*\.{one}\.(\d+)\..*"
    for pair, count in zip(patterns, matches(list(patterns.values()), modules), strict=True):
        if not count and pair[0] != "exclude_modules":
            yield pair


def matches(patterns: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return how many names each regular expression matches in full.

    They come from a file and may run forever, which only another process can end.

    Raises:
        InputError: If one is no regular expression, or takes too long.
    """
    # an own process, isolated (-I): a thread cannot be stopped in the middle of a match
    if not patterns:
        return []
    code = (
        "import json, re, sys\n"
        "patterns, names = json.load(sys.stdin)\n"
        "print(json.dumps([sum(bool(re.fullmatch(p, n)) for n in names) for p in patterns]))"
    )
    command, given = [sys.executable, "-I", "-c", code], json.dumps([list(patterns), list(names)])
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except subprocess.TimeoutExpired as error:
        found = f"a regular expression that takes more than {_SECONDS:g} s: {_short(list(patterns))}"
        raise InputError(found, expected="one without repetitions of repetitions") from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rpartition("\n")[2]
        raise InputError(f"not a regular expression: {reason}", expected="a regular expression") from error
    counts: list[int] = json.loads(done.stdout)
    return counts


def base_findings(folder: AdapterFolder, pinned: bool) -> Iterator[Finding]:
    """Yield the faults in the name and the revision of the base.

    Args:
        folder: The adapter.
        pinned: Whether the manifest has a commit of the base, or the hash of its weights.
    """
    from pytest_mistral_lora.checkpoint.pins import check_revision

    config, place = folder.config, str(folder.config_file)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name.strip():
        yield Finding("ML410", f"base_model_name_or_path is {_short(name)}", place, "the base that it was trained on")
    if revision is not None:
        try:
            check_revision(str(revision))
        except PinError as error:
            yield Finding("ML410", error.found, place, "a full commit: 40 lower-case hex digits")
    elif not pinned:
        expected = "the commit of the base, or a manifest with the hash of its weights"
        yield Finding("ML411", f"the revision of {_short(name)} is not recorded", place, expected)
