"""The tensors that an adapter must hold: PEFT itself says which, on a base without weights."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.weights import TensorInfo
from pytest_mistral_lora.conformance.adapter.config import lora_config, unmatched_patterns
from pytest_mistral_lora.conformance.adapter.files import Opened
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError, MistralLoraError, PinError

PREFIX = "base_model.model."
_MOST_LAYERS = 1000
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "head_dim"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
_SHOWN = 5
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_OTHER_MODEL = re.compile(
    r"vision_tower|vision_model|vision_encoder|multi_modal_projector|experts?\.\d+|block_sparse_moe"
    r"|^base_model\.model\.(model\.language_model|language_model\.model)\.layers\."
)
"""Names of Mistral's models with images or experts."""

_SIDE = re.compile(r"\.lora_(?P<side>A|B|a|b|down|up)(?P<inner>(?:\.[\w-]+)*?)(?P<weight>\.weight)?$")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?P<name>embed_tokens|lm_head)(?:\.base_layer|\.modules_to_save)?(?:\.default)?\.weight$"
)
_NOISE = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|base_layer|default|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_SIDES = {"a": "A", "down": "A", "b": "B", "up": "B"}


@dataclass(frozen=True)
class Layout:
    """A base and an adapter on it, without weights.

    Attributes:
        expected: Shape of each tensor that PEFT saves of this adapter, by name.
        modules: Dotted names of every module of the base.
        linear: Those of its linear layers.
        embedding: Shape of the base's embeddings; None where the base is not at hand.
        unmatched: Key and pattern of each regular expression of the configuration that matches no module.
        refusal: Why PEFT refuses the configuration; empty where it does not.
    """

    expected: Mapping[str, tuple[int, ...]]
    modules: tuple[str, ...]
    linear: tuple[str, ...]
    embedding: tuple[int, ...] | None = None
    unmatched: tuple[tuple[str, str], ...] = ()
    refusal: str = ""


def layout(opened: Opened, base: Path | None) -> Layout:
    """Put an adapter on a base without loading a weight.

    Args:
        opened: The adapter, with a configuration of the right form.
        base: The base checkpoint; None for a Mistral model with as many layers as the tensors speak of.

    Raises:
        InputError: If base or tensors are not of a `MistralForCausalLM`.
        PinError: If the base's configuration cannot be read, or has impossible sizes.
    """
    import torch
    from peft import get_peft_model, get_peft_model_state_dict

    sizes = _assumed_sizes(opened) if base is None else _base_sizes(base)
    config = opened.config or {}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _empty(sizes, base)
        modules = tuple(name for name, _ in model.named_modules() if name)
        linear = tuple(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        embedding = tuple(model.get_input_embeddings().weight.shape) if base is not None else None
        plain = Layout({}, modules, linear, embedding)
        try:
            # before PEFT: in its hands, a pattern can run forever
            unmatched = tuple(unmatched_patterns(config, modules))
            adapted = get_peft_model(model, lora_config(config))
            state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        except Exception as error:  # PEFT raises many types
            return replace(plain, refusal=" ".join(str(error).split())[:300])
    return replace(plain, expected={name: tuple(one.shape) for name, one in state.items()}, unmatched=unmatched)


def _base_sizes(base: Path) -> dict[str, Any]:
    from pytest_mistral_lora.checkpoint.base_model import ARCHITECTURE, read_config

    data = read_config(base)
    architectures, layers = data.get("architectures") or [data.get("model_type")], data.get("num_hidden_layers", 32)
    if architectures not in ([ARCHITECTURE], ["mistral"]):
        raise InputError(f"the base is {architectures}", place=str(base / "config.json"), expected=ARCHITECTURE)
    if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
        raise PinError(f"num_hidden_layers is {layers!r}", place=str(base / "config.json"))
    return {key: data[key] for key in _SIZES if data.get(key) is not None}


def _empty(sizes: Mapping[str, Any], base: Path | None) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    try:
        return MistralForCausalLM(MistralConfig(**sizes))
    except Exception as error:  # a size of a wrong type or value fails anywhere
        raise PinError(f"not the configuration of a Mistral model: {error}", place=str(base or "")) from error


def _assumed_sizes(opened: Opened) -> dict[str, Any]:
    names = opened.tensors or {}
    other = next((name for name in names if _OTHER_MODEL.search(name)), None)
    if (opened.config or {}).get("layer_replication"):
        raise InputError("layers are replicated, and the base is not at hand", place=opened.config_place)
    if other is not None:
        raise InputError(f"{other} is not of a MistralForCausalLM", place=opened.place)
    blocks = [int(match[1][:9]) for match in map(_BLOCK.search, names) if match]
    layers = max(blocks, default=0) + 1
    if layers > _MOST_LAYERS:
        raise InputError(f"a layer {layers - 1}", place=opened.place)
    size = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "num_attention_heads": 1}
    return {"num_hidden_layers": layers, "num_key_value_heads": 1, "head_dim": 8, **size}


def name_findings(opened: Opened, plan: Layout) -> Iterator[Finding]:
    """Yield the tensors that are missing, that fit nothing, or whose names PEFT will not find."""
    found, expected = opened.tensors or {}, plan.expected
    if not found:
        yield Finding("ML401", "the file holds no tensors", opened.place, f"{len(expected)} tensors")
        return
    renamed = _renamed(set(found) - set(expected), set(expected) - set(found))
    yield from _prefix_findings(renamed, opened)
    missing = sorted(set(expected) - set(found) - set(renamed.values()))
    extra = sorted(name for name in set(found) - set(expected) - set(renamed) if not _own_rows(name, opened, plan))
    wanted = f"the {len(expected)} tensors that PEFT saves of this configuration"
    yield from _few([Finding("ML401", f"{name} is missing", opened.place, wanted) for name in missing])
    yield from _few([Finding("ML401", f"{name} fits no adapted layer", opened.place, wanted) for name in extra])


def _few(findings: list[Finding]) -> Iterator[Finding]:
    yield from findings[:_SHOWN]
    if rest := findings[_SHOWN:]:
        yield Finding(rest[0].rule, f"{rest[0].found}, and {len(rest) - 1} more like it", rest[0].place)


def _own_rows(name: str, opened: Opened, plan: Layout) -> bool:
    """Say whether a tensor is a full embedding: PEFT saves it too where it was resized, or is itself adapted."""
    match = _EMBEDDING.search(name)
    if match is None:
        return False
    targets = (opened.config or {}).get("target_modules")
    return resized(name, opened.tensors or {}, plan) or (isinstance(targets, list) and match["name"] in targets)


def resized(name: str, tensors: Mapping[str, TensorInfo], plan: Layout) -> bool:
    """Say whether a tensor is an embedding with another number of rows than the adapter's plan has."""
    match = _EMBEDDING.search(name)
    return match is not None and plan.embedding is not None and tensors[name].shape != plan.embedding


def _renamed(unknown: set[str], wanted: set[str]) -> dict[str, str]:
    """Return the name that PEFT looks for, of each unknown name that means the same tensor."""
    by_core = {_core(name): name for name in wanted}
    pairs = {name: by_core[_core(name)] for name in sorted(unknown) if _core(name) in by_core}
    return pairs if len(set(pairs.values())) == len(pairs) else {}


def _core(name: str) -> str:
    """Reduce a name to the layer and the side: whatever stands before the block, and wrappers within, is dropped."""
    match = _SIDE.search(name)
    tail = f".lora_{_SIDES.get(match['side'], match['side'])}" if match else ""
    layer = _NOISE.sub("", name[: match.start()] + "." if match else name)
    block = _BLOCK.search(layer)
    if block:
        return layer[block.start() :].strip(".") + tail
    return layer.strip(".").rpartition("model.")[2] + tail


def _prefix_findings(renamed: Mapping[str, str], opened: Opened) -> Iterator[Finding]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, right in renamed.items():
        groups[_fault(name, right)].append(name)
    for fault, names in groups.items():
        found = f"{len(names)} names that PEFT does not find: {fault}; the first is {names[0]}"
        yield Finding("ML407", found, opened.place, renamed[names[0]])


def _fault(name: str, right: str) -> str:
    """Say in which way a name differs from the one that PEFT looks for."""
    for inner in ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "language_model."):
        if inner in name:
            return f"{inner!r} is in it"
    match = _SIDE.search(name)
    if match and match["inner"]:
        return f"the adapter's name {match['inner'].strip('.')!r} is in it"
    if ".base_layer." in name:
        return "'.base_layer' is in it"
    if name.count(PREFIX) > 1:
        return f"{PREFIX!r} is there twice"
    if not name.startswith(PREFIX):
        return f"{PREFIX!r} is missing"
    if _head(name) != _head(right):
        return f"it begins with {_head(name)!r}, not {_head(right)!r}"
    return "it ends otherwise"


def _head(name: str) -> str:
    block = _BLOCK.search(name)
    return name[: block.start() + 1] if block else name.partition(".lora_")[0]


def rank_findings(opened: Opened, plan: Layout) -> Iterator[Finding]:
    """Yield each tensor of another rank than the configuration says."""
    for name, expected, shape in _shapes(opened, plan):
        axis = _rank_axis(name)
        if axis is not None and (len(shape) != 2 or shape[axis] != expected[axis]):
            rank = f"rank {expected[axis]}, as the configuration says"
            yield Finding("ML404", f"{name} has shape {shape}", opened.place, rank)


def shape_findings(opened: Opened, plan: Layout) -> Iterator[Finding]:
    """Yield each tensor that does not fit the base's layer, and embeddings of another vocabulary."""
    for name, expected, shape in _shapes(opened, plan):
        axis = _rank_axis(name)
        if axis is not None and len(shape) != 2:
            continue  # the rank is wrong too
        fits = shape == expected if axis is None else shape[1 - axis] == expected[1 - axis]
        if not fits and not _EMBEDDING.search(name):
            yield Finding("ML412", f"{name} has shape {shape}", opened.place, f"{expected}, for this base")
    for name, info in (opened.tensors or {}).items():
        if resized(name, opened.tensors or {}, plan):
            found = f"{name} has shape {info.shape}: the vocabulary was resized, or the base is another"
            yield Finding("ML412", found, opened.place, f"{plan.embedding}, for this base")


def _rank_axis(name: str) -> int | None:
    if re.search(r"\.lora_(A|embedding_A)(\.weight)?$", name):
        return 0
    return 1 if re.search(r"\.lora_(B|embedding_B)(\.weight)?$", name) else None


def _shapes(opened: Opened, plan: Layout) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    tensors = opened.tensors or {}
    for name in sorted(plan.expected.keys() & tensors.keys()):
        yield name, plan.expected[name], tensors[name].shape


def not_mistral(error: MistralLoraError) -> str:
    """Return why names and shapes are not checked."""
    return f"names and shapes are known of MistralForCausalLM only: {error}"
