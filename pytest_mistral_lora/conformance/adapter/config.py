"""The checks of `adapter_config.json`: is it complete, and can PEFT use it without a risk?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import PinError, short_json
from pytest_mistral_lora.records.adapter_config import key_faults, match_counts, patterns_of
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

_PIN = "a full commit: 40 lower-case hex digits"


def configuration_findings(folder: AdapterFolder) -> Iterator[Finding]:
    """Yield the keys of a configuration that are missing, have a value that no LoRA has, or are not supported."""
    for fault in key_faults(folder.config):
        rule = "ML408" if fault.supported else "ML422"
        yield Finding(rule, fault.found, str(folder.config_file), fault.expected)


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
        InputError: As for `match_counts`.
    """
    patterns = patterns_of(config)
    for pair, count in zip(patterns, match_counts(list(patterns.values()), modules), strict=True):
        if not count and pair[0] != "exclude_modules":
            yield pair


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
        yield Finding(
            "ML410", f"base_model_name_or_path is {short_json(name)}", place, "the base that it was trained on"
        )
    if revision is not None:
        if not isinstance(revision, str) or len(revision) > 100:
            yield Finding("ML410", f"revision {short_json(revision)} is not a pin", place, _PIN)
            return
        try:
            check_revision(revision)
        except PinError as error:
            yield Finding("ML410", error.found, place, _PIN)
    elif not pinned:
        expected = "the commit of the base, or a manifest with the hash of its weights"
        yield Finding("ML411", f"the revision of {short_json(name)} is not recorded", place, expected)
