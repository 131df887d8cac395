"""The tensors that an adapter must hold, by name and shape, from PEFT on a base without weights."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pytest_mistral_lora.checkpoint.architectures import ALL, is_known
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.weights import TensorInfo
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError, MistralLoraError, PinError, and_more, one_line
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_config import match_counts, patterns_of
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

PREFIX = "base_model.model."
_MOST_LAYERS = 1000
_SHOWN = 5
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_OTHER_MODEL = re.compile(
    r"vision_tower|vision_model|vision_encoder|multi_modal_projector|experts?\.\d+|block_sparse_moe"
    r"|^base_model\.model\.(model\.language_model|language_model\.model)\.layers\."
)
"""Names of Mistral's models with images or experts."""

_SIDE = re.compile(r"\.lora_(?P<side>A|B|a|b|down|up)(?P<inner>(?:\.[\w-]+)*?)(?P<weight>\.weight)?$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
"""A part of the names of experts that have layers of their own, as in transformers 4."""
_EMBEDDING = re.compile(
    r"(?:^|\.)(?P<name>embed_tokens|lm_head)(?:\.base_layer|\.modules_to_save)?(?:\.default)?\.weight$"
)
_NOISE = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|base_layer|default|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_SIDES = {"a": "A", "down": "A", "b": "B", "up": "B"}


@dataclass(frozen=True)
class AdapterLayout:
    """A base and an adapter on it, without weights.

    Attributes:
        expected: Shape of each tensor that PEFT saves for this adapter, by name.
        modules: Dotted names of every module of the base.
        linear: Those of its linear layers.
        embedding: Shape of the base's embeddings; None if the base is missing.
        unmatched: Key and pattern of each regular expression of the configuration that matches no module.
        refusal: Why PEFT refuses the configuration; empty if it accepts it.
        scalings: Factor of B A in each adapted layer, by the layer's name in the base.
        loaded: Shape of each tensor of the file as PEFT loads it, by the name that it looks for.
        converted: Names of `target_modules` that PEFT replaces by names of parameters when it loads the adapter.
    """

    expected: Mapping[str, tuple[int, ...]]
    modules: tuple[str, ...]
    linear: tuple[str, ...]
    embedding: tuple[int, ...] | None = None
    unmatched: tuple[tuple[str, str], ...] = ()
    refusal: str = ""
    scalings: Mapping[str, float] = field(default_factory=dict)
    loaded: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    converted: frozenset[str] = frozenset()

    def is_resized(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor is an embedding whose shape differs from the base's."""
        return self.embedding is not None and shape != self.embedding and _EMBEDDING.search(name) is not None


def adapter_layout(folder: AdapterFolder, base: BaseFolder | None) -> AdapterLayout:
    """Put an adapter on a base without loading a weight.

    Args:
        folder: The adapter, with a configuration of the right form.
        base: The base checkpoint; None for a Mistral model with as many layers as the tensors name.

    Raises:
        InputError: If the base's class is unknown, or if the base is missing and the tensors are not those of a
            `MistralForCausalLM`.
        PinError: If the base's configuration cannot be read or has impossible sizes, or the user named a base of an
            unknown class.
    """
    import torch
    from peft import get_peft_model, get_peft_model_state_dict

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _assumed_base(folder) if base is None else _known_base(base, folder)
        modules = tuple(name for name, _ in model.named_modules() if name)
        linear = tuple(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        embedding = tuple(model.get_input_embeddings().weight.shape) if base is not None else None
        plain = AdapterLayout({}, modules, linear, embedding)
        try:
            # before PEFT, which would run a pattern in this process: a hostile one never ends
            # PEFT gives experts their ranks by the names of parameters
            parameters = (
                [name for name, _ in model.named_parameters()] if folder.config.get("target_parameters") else []
            )
            unmatched = tuple(unmatched_patterns(folder.config, (*modules, *parameters)))
            adapted = get_peft_model(model, folder.lora_config(modules))
            state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            loaded = _as_loaded(readable_tensors(folder), adapted)
        except InputError as error:
            return replace(plain, refusal=error.found.removeprefix("PEFT refuses it: "))
        except Exception as error:  # PEFT raises many types
            return replace(plain, refusal=one_line(error))
    scalings = {
        name.removeprefix(PREFIX): float(module.scaling["default"])
        for name, module in adapted.named_modules()
        if "default" in getattr(module, "lora_A", ())
    }
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    named = folder.config.get("target_modules")
    kept = adapted.peft_config["default"].target_modules or ()
    converted = frozenset(named if isinstance(named, list) else ()) - {*kept}
    return replace(plain, expected=expected, unmatched=unmatched, scalings=scalings, loaded=loaded, converted=converted)


def _as_loaded(tensors: Mapping[str, TensorInfo], adapted: Any) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of each tensor as PEFT loads it: it joins experts that a file of transformers 4 has apart.

    Args:
        tensors: The tensors of the file.
        adapted: The model with the adapter, on the meta device.
    """
    import torch

    shapes = {name: tuple(info.shape) for name, info in tensors.items()}
    if not any(_EXPERT.search(name) for name in shapes):
        return shapes
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:
        return shapes  # a PEFT that joins none
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        found = convert_peft_adapter_state_dict_for_transformers(adapted, adapted.peft_config["default"], state)
    except Exception:  # PEFT raises many types, for tensors that do not fit together, too
        return shapes
    return {name.replace(".default.", "."): tuple(tensor.shape) for name, tensor in found.items()}


def _known_base(base: BaseFolder, folder: AdapterFolder) -> Any:
    config = base.config
    if not is_known(config):
        found = f"the base is {config.get('architectures') or config.get('model_type')!r}"
        # a base that you name must be usable; a base that an adapter records need not be
        kind = PinError if folder.given_base is not None else InputError
        raise kind(found, place=str(base.config_file), expected=f"one of {', '.join(ALL)}")
    return base.empty_model()


def _assumed_base(folder: AdapterFolder) -> Any:
    """Return a Mistral model with a place for every tensor's name; its shapes do not fit."""
    from transformers import MistralConfig, MistralForCausalLM

    names, place = readable_tensors(folder), Place.of(folder.tensors_file)
    other = next((name for name in names if _OTHER_MODEL.search(name)), None)
    if folder.config.get("layer_replication"):
        raise InputError("layers are replicated, and the base is missing", place=str(folder.config_file))
    if other is not None:
        raise InputError(f"{other} is not of a MistralForCausalLM", place=place)
    blocks = [int(match[1][:9]) for match in map(_BLOCK.search, names) if match]
    layers = max(blocks, default=0) + 1
    # even without weights, each layer takes time and memory
    if layers > _MOST_LAYERS:
        raise InputError(f"a layer {layers - 1}", place=place)
    size = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "num_attention_heads": 1}
    return MistralForCausalLM(MistralConfig(num_hidden_layers=layers, num_key_value_heads=1, head_dim=8, **size))


def unmatched_patterns(config: Mapping[str, Any], modules: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield key and pattern of each regular expression that matches no module.

    Raises:
        InputError: As for `match_counts`.
    """
    patterns = patterns_of(config)
    for pair, count in zip(patterns, match_counts(list(patterns.values()), modules), strict=True):
        if not count and pair[0] != "exclude_modules":
            yield pair


def readable_tensors(folder: AdapterFolder) -> Mapping[str, TensorInfo]:
    """Return the header of the tensors; an empty header if it cannot be read, which the check `files` reports."""
    try:
        return folder.tensors
    except InputError:
        return {}


def name_findings(folder: AdapterFolder, layout: AdapterLayout) -> Iterator[Finding]:
    """Yield the tensors that are missing, fit nothing, or have names that PEFT will not find."""
    found, expected, place = layout.loaded, layout.expected, Place.of(folder.tensors_file)
    unknown, absent = set(found) - set(expected), set(expected) - set(found)
    # the name that PEFT looks for, of each unknown name that means the same tensor
    by_core = {_tensor_core(name): name for name in absent}
    renamed = {name: by_core[_tensor_core(name)] for name in sorted(unknown) if _tensor_core(name) in by_core}
    if len(set(renamed.values())) < len(renamed):
        renamed = {}  # two names of one tensor: either could be meant
    groups: dict[str, list[str]] = defaultdict(list)
    for name, right in renamed.items():
        groups[_naming_fault(name, right)].append(name)
    for fault, names in groups.items():
        count = f"{len(names)} names that PEFT does not find: {fault}; the first is {names[0]}"
        yield Finding("ML407", count, place, renamed[names[0]])
    # PEFT saves an embedding in full if it was resized, or is itself adapted
    adapted = {layer for layer, sign, _ in (name.partition(".lora_") for name in expected) if sign}
    extra = [
        name
        for name in sorted(unknown - set(renamed))
        if not layout.is_resized(name, found[name])
        and not ((match := _EMBEDDING.search(name)) and name[: match.end("name")] in adapted)
    ]
    wanted = f"the {len(expected)} tensors that PEFT saves of this configuration"
    for names, fault in ((sorted(absent - set(renamed.values())), "is missing"), (extra, "fits no adapted layer")):
        yield from (Finding("ML401", f"{name} {fault}", place, wanted) for name in names[:_SHOWN])
        if names[_SHOWN:]:
            yield Finding("ML401", f"{names[_SHOWN]} {fault}{and_more(_SHOWN + 1, len(names))} like it", place)


def _tensor_core(name: str) -> str:
    """Reduce a name to the layer and the side: everything before the block, and wrappers within, is dropped."""
    match = _SIDE.search(name)
    tail = f".lora_{_SIDES.get(match['side'], match['side'])}" if match else ""
    layer = _NOISE.sub("", name[: match.start()] + "." if match else name)
    block = _BLOCK.search(layer)
    if block:
        return layer[block.start() :].strip(".") + tail
    return layer.strip(".").rpartition("model.")[2] + tail


def _naming_fault(name: str, right: str) -> str:
    """Describe the difference between a name and the name that PEFT looks for."""
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
    heads = []
    for tensor_name in (name, right):
        block = _BLOCK.search(tensor_name)
        heads.append(tensor_name[: block.start() + 1] if block else tensor_name.partition(".lora_")[0])
    return f"it begins with {heads[0]!r}, not {heads[1]!r}" if heads[0] != heads[1] else "it ends otherwise"


def rank_findings(folder: AdapterFolder, layout: AdapterLayout) -> Iterator[Finding]:
    """Yield each tensor whose rank differs from the configuration's."""
    patterns, pairs = folder.config.get("rank_pattern") or {}, list(_shape_pairs(layout))
    ranks = {shape[axis] for name, _, shape in pairs if len(shape) == 2 and (axis := _rank_axis(name)) is not None}
    for name, expected, shape in pairs:
        axis = _rank_axis(name)
        if axis is None or (len(shape) == 2 and shape[axis] == expected[axis]):
            continue
        # PEFT's own match, whose time the layout has bounded
        layer = name.removeprefix(PREFIX).partition(".lora_")[0]
        pattern = next((regex for regex in patterns if re.match(rf"(.*\.)?({regex})$", layer)), None)
        source = f"as rank_pattern gives for {pattern!r}" if pattern is not None else "as r gives"
        if pattern is None and len(ranks) > 1:
            state = "has no pattern for this layer" if patterns else "is empty"
            source += f": rank_pattern {state}, and the tensors have the ranks {', '.join(map(str, sorted(ranks)))}"
        found = f"{name} has shape {shape}"
        yield Finding("ML404", found, Place.of(folder.tensors_file), f"rank {expected[axis]}, {source}")


def shape_findings(folder: AdapterFolder, layout: AdapterLayout) -> Iterator[Finding]:
    """Yield each tensor that does not fit the base's layer, and embeddings for another vocabulary."""
    place = Place.of(folder.tensors_file)
    for name, expected, shape in _shape_pairs(layout):
        axis = _rank_axis(name)
        if axis is not None and len(shape) != 2:
            continue  # the rank is wrong too
        fits = shape == expected if axis is None else shape[1 - axis] == expected[1 - axis]
        if not fits and not _EMBEDDING.search(name):
            yield Finding("ML412", f"{name} has shape {shape}", place, f"{expected}, for this base")
    for name, info in folder.tensors.items():
        if layout.is_resized(name, info.shape):
            found = f"{name} has shape {info.shape}: the vocabulary was resized, or the base is another"
            yield Finding("ML412", found, place, f"{layout.embedding}, for this base")


def _rank_axis(name: str) -> int | None:
    """Return the axis of a tensor that has the rank r: A is (r, inputs), and B is (outputs, r)."""
    if re.search(r"\.lora_(A|embedding_A)(\.weight)?$", name):
        return 0
    return 1 if re.search(r"\.lora_(B|embedding_B)(\.weight)?$", name) else None


def _shape_pairs(layout: AdapterLayout) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    for name in sorted(layout.expected.keys() & layout.loaded.keys()):
        yield name, layout.expected[name], layout.loaded[name]


def not_mistral(error: MistralLoraError) -> str:
    """Return why names and shapes are not checked."""
    return f"names and shapes are known of some classes only: {error}"
