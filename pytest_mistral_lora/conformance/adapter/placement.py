"""The layers that an adapter changes, by their names: of text or images, of a router or experts, and of which class."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.architectures import ALL, TEXT_MODELS, Architecture, architecture_of
from pytest_mistral_lora.checkpoint.base_model import read_config
from pytest_mistral_lora.conformance.adapter.weights import TOWER, TensorSummary
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import and_more
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

_ROUTER = re.compile(r"\.(?:mlp|block_sparse_moe)\.(?:gate|router)(?=\.)")
_EXPERTS = re.compile(r"\.(?:mlp|block_sparse_moe)\.(?:shared_)?experts?(?=\.)")
_LAYER = re.compile(r"\.layers\.\d+\.(?P<block>self_attn|mlp)\.(?P<kind>\w+)\.(?:lora_|base_layer\.)")
# (?!…) and (?<!…), up to one group deep: they name layers that are left alone
_NOT_THESE = re.compile(r"\(\?<?!(?:[^()]|\([^()]*\))*\)")
_KINDS = tuple(dict.fromkeys(kind for one in TEXT_MODELS.values() for kind in (*one.attention, *one.mlp)))


def placement_findings(folder: AdapterFolder, summaries: Mapping[str, TensorSummary]) -> Iterator[Finding]:
    """Yield the tensors that are on other layers than the text's own, or on fewer than the pattern names."""
    names, place = sorted(folder.tensors), str(folder.tensors_file)
    tower = [name for name in names if TOWER.search(name)]
    still = [name for name in tower if ".lora_B" in name and summaries[name].largest == 0]
    if still:
        found = f"{len(tower)} of {len(names)} tensors are on the model of images, and {len(still)} of them never moved"
        expected = r"layers of the text alone: model\.language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
        yield Finding("ML450", f"{found}; the first is {still[0]}", place, expected)
    left_out = _left_out(folder.config, names)
    if left_out is not None:
        named, adapted = left_out
        found = f"target_modules names {', '.join(named)}, and {', '.join(adapted)} alone is adapted"
        yield Finding("ML451", found, str(folder.config_file), "a layer of each kind that it names")
    for rule, pattern, part in (("ML452", _ROUTER, "the router"), ("ML453", _EXPERTS, "the experts")):
        found_names = [name for name in names if pattern.search(name)]
        if found_names:
            found = f"{part} of the model changed: {found_names[0]}{and_more(1, len(found_names))}"
            yield Finding(rule, found, place, "the attention alone")


def _left_out(config: Mapping[str, Any], names: list[str]) -> tuple[list[str], list[str]] | None:
    """Return the kinds of layers that a pattern names and that nothing is adapted of, and the adapted ones."""
    pattern = config.get("target_modules")
    # the names of a list are compared with the base, one by one, by the check `configuration`
    if not isinstance(pattern, str) or config.get("exclude_modules"):
        return None
    words = re.findall(r"[A-Za-z]\w*", re.sub(r"\\[A-Za-z]", " ", _NOT_THESE.sub(" ", pattern)))
    asked = [kind for kind in _KINDS if kind in words or (kind.removesuffix("_proj") in words and "_proj" in pattern)]
    adapted = {match["kind"] for match in map(_LAYER.search, names) if match}
    missing = [kind for kind in asked if kind not in adapted]
    return (missing, [kind for kind in _KINDS if kind in adapted]) if missing and adapted else None


def class_findings(folder: AdapterFolder, base: Path) -> Iterator[Finding]:
    """Yield a finding if the adapter was made for a base of another class, by its names or by the class it records."""
    try:
        architecture = architecture_of(read_config(base))
    except ValueError:
        return  # a class that is not known here: names and shapes are not checked
    place, expected = str(folder.tensors_file), f"an adapter of a {architecture.title}, as {base} is one"
    for name in sorted(folder.tensors):
        if reason := _foreign(name, architecture):
            yield Finding("ML454", f"{name}: {reason}", place, expected)
            return
    recorded = folder.config.get("auto_mapping")
    made_for = recorded.get("base_model_class") if isinstance(recorded, dict) else None
    if made_for in ALL and made_for != architecture.name:
        found = f"auto_mapping has the class {made_for}, which the adapter was trained on"
        yield Finding("ML454", found, str(folder.config_file), expected)


def _foreign(name: str, architecture: Architecture) -> str:
    """Return why no layer of a class can have a tensor of this name; empty if one can."""
    text = architecture.text
    if TOWER.search(name):
        return "" if architecture.is_wrapped else "the base has no model of images"
    if _ROUTER.search(name) or _EXPERTS.search(name):
        return f"{text.name} has no experts" if text.mlp else ""
    match = _LAYER.search(name)
    if match is None or match["kind"] not in _KINDS:
        return ""
    kind, block = match["kind"], match["block"]
    if block == "self_attn" and kind not in text.attention:
        return f"{text.name} has no {kind}: its attention is {', '.join(text.attention)}"
    # the first layers of a model with experts may have a plain MLP
    if block == "mlp" and text.model_type == "mixtral":
        return f"{text.name} has no {kind}: experts are in its place"
    return ""
