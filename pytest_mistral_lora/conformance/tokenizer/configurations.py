"""The configurations of a model's folder: whether they describe one model, and whether its class reads their keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, TextModel, architecture_of, is_known
from pytest_mistral_lora.checkpoint.model_facts import (
    ModelFacts,
    contradictions,
    facts_of_config,
    facts_of_params,
    shown,
    spelling_conflicts,
)
from pytest_mistral_lora.checkpoint.read_keys import newest_read_keys, read_keys
from pytest_mistral_lora.checkpoint.tokenizer_folder import MODEL_CONFIG, PARAMS
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.places import Place

_READERS = "transformers reads config.json, and a server of Mistral's format reads params.json"


def configurations_agree(target: Target) -> Iterator[Finding]:
    """Yield ML243 and ML244 for the configurations of a checkpoint's folder."""
    files = target.tokenizer.files
    params = files.json(PARAMS)
    yield from configuration_findings(
        files.json(MODEL_CONFIG), files.place(MODEL_CONFIG), params, files.place(PARAMS) if params else None
    )


def configuration_findings(
    config: Mapping[str, Any], place: Place, params: Mapping[str, Any], other: Place | None
) -> Iterator[Finding]:
    """Yield ML243 for each fact that two configurations state differently, and ML244 for keys that the class ignores.

    Args:
        config: The object of `config.json`; empty if there is none.
        place: Its place.
        params: The object of `params.json`; empty if there is none.
        other: Its place; None if there is none.
    """
    if not config:
        return
    for new, old in spelling_conflicts(config):
        text = f"{new.text}, as {new.key}: transformers reads {old.key}"
        yield Finding("ML243", old.as_found, place, text)
    if other is not None:
        for stated, found in contradictions(facts_of_config(config), facts_of_params(params)):
            yield Finding("ML243", found.as_found, other, f"{stated.as_expected(place.source.name)}; {_READERS}")
    yield from _ignored_keys(config, place)


def _ignored_keys(config: Mapping[str, Any], place: Place) -> Iterator[Finding]:
    """Yield ML244 for each key that changes a model's numbers, and that its class does not read."""
    if not is_known(config):
        return
    try:
        text = architecture_of(config).text
    except ValueError:
        return  # the check of a recipe's base reports a class that is not known
    reads = read_keys(version("transformers")).get(text.name)
    if reads is None:
        return  # a class whose keys were not recorded
    given = dict(_changing_keys(config, text))
    for key, (value, where, name) in given.items():
        if key in reads:
            continue
        found = f"{where} is {shown(value)}: {text.name} does not read it"
        wanted = {*(key for key in given if key in reads), name}
        yield Finding("ML244", found, place, _reader_of(name, wanted, text, reads))


def _changing_keys(config: Mapping[str, Any], text: TextModel) -> Iterator[tuple[str, tuple[Any, str, str]]]:
    """Yield each key whose value changes a logit: its value, its place, and the name that a class reads it by."""
    facts = ModelFacts(config)
    level = [*facts.levels][-1]
    beta, top = facts.rope.get("llama_4_scaling_beta"), facts.text.get("llama_4_scaling")
    if beta:
        yield "llama_4_scaling_beta", (beta, f"{level}{facts.rope_key}.llama_4_scaling_beta", "llama_4_scaling_beta")
    elif isinstance(top, Mapping) and top.get("beta"):
        yield "llama_4_scaling", (top["beta"], f"{level}llama_4_scaling.beta", "llama_4_scaling_beta")
    window, kinds = facts.window, facts.layer_types
    if type(window) is int and (type(facts.context) is not int or window < facts.context):
        yield "sliding_window", (window, f"{level}sliding_window", "sliding_window")
    plain = "full_attention" if window is None else "sliding_attention"
    # for a class that has windows: the types of another class mean other things
    if text.has_window and isinstance(kinds, list) and any(kind != plain for kind in kinds):
        yield "layer_types", (kinds, f"{level}layer_types", "layer_types")


def _reader_of(name: str, wanted: set[str], text: TextModel, reads: frozenset[str]) -> str:
    """Return what to write so that a key is read: another name of the key, or the class that reads all of them."""
    if name in reads:
        return f"{name} in rope_parameters, where {text.name} reads it"
    newest = newest_read_keys()
    for model in TEXT_MODELS.values():
        if (
            model.attention == text.attention
            and model.mlp == text.mlp
            and wanted <= newest.get(model.name, frozenset())
        ):
            since = f", in transformers {model.since} or later" if model.since else ""
            return f'"model_type": "{model.model_type}": {model.name} reads it{since}'
    return "no such key: no class of this layout reads it"
