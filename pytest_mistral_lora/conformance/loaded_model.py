"""The model of a trainer in memory against what it says of itself: its configuration, its checkpoint, its adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from pytest_mistral_lora.checkpoint.architectures import architecture_of
from pytest_mistral_lora.checkpoint.loaded_tokenizer import place_of
from pytest_mistral_lora.checkpoint.model_facts import TIE, ModelFacts
from pytest_mistral_lora.checkpoint.tokenizer_folder import MODEL_CONFIG, TokenizerFiles
from pytest_mistral_lora.conformance.adapter.weights import tied_findings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.merged.structure import HEADS, difference_findings, own_findings
from pytest_mistral_lora.conformance.model_targets import MODEL_PLACE, TrainerTarget
from pytest_mistral_lora.errors import and_more
from pytest_mistral_lora.places import NamedSource, Place

_CONFIG_PLACE = Place(NamedSource(f"{MODEL_PLACE}.config", is_value=True))
_NO_CONFIG = "the model has no configuration of transformers"

# PEFT puts these around the names of a model
_AROUND = re.compile(r"^base_model\.model\.|\.(?:base_layer|original_module|token_adapter)(?=\.|$)")
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn$")
_OF_ADAPTER = re.compile(r"lora_\w+\.(\w+)")
_OWN_RULES = ("bos_token_id", "eos_token_id", *HEADS, "head_dim")
"""Keys of the configuration that another check compares with the tokenizer or the weights."""
_AS_LOADED = (
    "Leave `model.config` as it was loaded. If you mean another value, load the model with it: "
    "`from_pretrained(BASE, KEY=VALUE)`."
)
_AS_ACTIVE = (
    "Before you make the trainer, call `model.set_adapter(NAME)` of the PEFT model with the adapter that you train, "
    "and leave it switched on and unmerged."
)
_AS_SCALED = (
    "Set `lora_alpha`, `r` and their patterns in the `LoraConfig` before the adapter is made, and leave `set_scale` "
    "and `scale_layer` out: what is saved has the scale of the configuration."
)
_APART = 0.01
"""The relative distance from which two frequencies differ: bfloat16 has eight bits."""
_COMPARED = 64
"""Most rows of embeddings that are compared with each other."""
_ALIKE = 2**-6
"""The relative distance up to which two rows of embeddings are one to a model: its first layer divides by the norm."""


def as_configured(target: TrainerTarget) -> Result:
    """Judge sizes, ties, scales and active adapters: of two statements of the model about itself, one is wrong."""
    config = _config_of(target)
    if config is None:
        return Result(not_checked=_NO_CONFIG)
    found = [*_tie_findings(target, config), *_active_findings(target), *_scale_findings(target)]
    try:
        architecture_of(config)
    except ValueError as error:
        return Result(tuple(found), not_checked=f"the sizes of a model that is {error}")
    return Result((*_size_findings(target, config), *found))


def as_stored(target: TrainerTarget) -> Result:
    """Compare the layers with the configuration where numbers alone differ, and the configuration with its file."""
    config = _config_of(target)
    if config is None:
        return Result(not_checked=_NO_CONFIG)
    found = [*_rope_findings(target), *_window_findings(target)]
    if not getattr(target.model.config, "name_or_path", ""):
        return Result(tuple(found))  # made of its configuration
    folder = place_of(target.model.config)
    files = None if folder is None else TokenizerFiles(folder)
    if files is None or MODEL_CONFIG not in files.names:
        return Result(tuple(found), not_checked="the folder that the model was loaded from is not on this machine")
    # of a configuration that the layers contradict, the layers are what was loaded
    others = (*_OWN_RULES, "rope", "sliding_window", "layer_types") if found else _OWN_RULES
    differences = difference_findings(
        config, files.json(MODEL_CONFIG), _CONFIG_PLACE, f"in {files.place(MODEL_CONFIG)}"
    )
    found += (finding.under("ML328") for finding in differences if not finding.found.startswith(others))
    return Result(tuple(found))


def new_rows(target: TrainerTarget) -> Result:
    """Look for rows of the embeddings that are newer than the checkpoint, used by the batches, and not trained."""
    folder = place_of(getattr(target.model, "config", None))
    known = None if folder is None else ModelFacts(TokenizerFiles(folder).json(MODEL_CONFIG)).vocabulary
    used = sorted(token for token in target.ids if token >= (target.oracle.vocab_size if known is None else known))
    if not used:
        return Result()
    if known is None:
        return Result(not_checked="the folder that the model was loaded from is not on this machine")
    embeddings = target.model.get_input_embeddings()
    weight = _plain(embeddings).weight
    if not weight.numel():
        return Result(not_checked="the embeddings are divided among processes")
    still = [token for token in used if token < len(weight) and not _is_trained(embeddings, token)]
    if not still:
        return Result()
    found = (
        f"the batches use {len(still)} rows of the embeddings that the checkpoint does not have, and none is trained"
    )
    expected = "trained rows: modules_to_save or trainable_token_indices of the adapter"
    rows = {token: weight[token].detach().float().cpu() for token in still[:_COMPARED]}
    for (first, row), (second, other) in combinations(rows.items(), 2):
        if (row - other).norm() <= _ALIKE * max(row.norm(), other.norm()):
            found += f": {first} and {second} are the same to the model"
            return Result((Finding("ML329", found, MODEL_PLACE, expected, severity="error"),))
    return Result((Finding("ML329", f"{found}: the first is {still[0]}", MODEL_PLACE, expected),))


def _is_trained(embeddings: Any, token: int) -> bool:
    """Return whether a row of embeddings is trained, in the module itself or in what PEFT has put around it."""
    indices = getattr(getattr(embeddings, "token_adapter", None), "token_indices", {})
    trained = [name for name, parameter in embeddings.named_parameters() if parameter.requires_grad]
    if any("trainable_tokens_delta" not in name for name in trained):
        return True
    return bool(trained) and any(token in tokens for tokens in indices.values())


def _config_of(target: TrainerTarget) -> Mapping[str, Any] | None:
    config = getattr(target.model, "config", None)
    return None if config is None or not hasattr(config, "to_dict") else config.to_dict()


def _plain(module: Any) -> Any:
    """Return the module of the base within those of PEFT."""
    while (inner := getattr(module, "original_module", getattr(module, "base_layer", None))) is not None:
        module = inner
    return module


def _size_findings(target: TrainerTarget, config: Mapping[str, Any]) -> Iterator[Finding]:
    shapes, blocks = {}, set()
    for name, module in target.modules.items():
        name = _AROUND.sub("", name)
        weight = module._parameters.get("weight")
        # a weight that DeepSpeed shards has its whole shape beside it
        shape = tuple(getattr(weight, "ds_shape", getattr(weight, "shape", ())))
        if weight is not None and (len(shape) != 2 or not weight.is_floating_point()):  # flattened, or quantised
            shape = tuple(getattr(module, side, 0) for side in ("out_features", "in_features"))
        if len(shape) == 2 and all(shape):
            shapes[f"{name}.weight"] = shape
        blocks |= {match[1] for match in (_BLOCK.search(name),) if match and "vision" not in name}
    found = [*own_findings(config, shapes, _CONFIG_PLACE)]
    layers = ModelFacts(config).layers
    if blocks and layers != len(blocks):
        expected = f"{len(blocks)}, the layers of the model"
        found.append(Finding("ML321", f"num_hidden_layers is {layers}", _CONFIG_PLACE, expected))
    # a width that is wrong is so in each kind of layer
    for finding in found[:1]:
        yield finding.under("ML321", name="ML321.sizes", fix=_AS_LOADED)


def _tie_findings(target: TrainerTarget, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield a finding if input and output embeddings are one tensor, and the configuration says otherwise, or two."""
    sides = [_plain(side()) for side in (target.model.get_input_embeddings, target.model.get_output_embeddings)]
    first, second = (getattr(side, "weight", None) for side in sides)
    is_tied = bool(config.get(TIE))
    if first is None or second is None:
        return
    is_one = first is second or (first.data_ptr() == second.data_ptr() and first.shape == second.shape)
    # nothing of a tensor that is elsewhere can be told
    is_known = all(weight.numel() and not weight.is_meta for weight in (first, second))
    if is_tied != is_one and (first is second or is_known):
        tensors = "one tensor" if is_one else "two tensors"
        found = f"{TIE} is {str(is_tied).lower()}, and the input and the output embeddings are {tensors}"
        expected = str(not is_tied).lower()
        yield Finding("ML321", found, _CONFIG_PLACE, expected, name="ML321.ties", fix=_AS_LOADED)
    elif is_tied and not any(getattr(config, "ensure_weight_tying", False) for config in target.lora_configs.values()):
        trained = [name for name, parameter in target.parameters.items() if parameter.requires_grad]
        yield from tied_findings(
            [
                re.sub(r"\.modules_to_save\.[^.]+", "", name)
                for name in trained
                if "modules_to_save" in name or ".lora_" in name
            ],
            MODEL_PLACE,
        )


def _active_findings(target: TrainerTarget) -> Iterator[Finding]:
    """Yield a finding if other adapters act than the model names, or one is trained and does not act."""
    declared = vars(target.model).get("active_adapter")
    named = {declared} if isinstance(declared, str) else set(declared or ())
    other: dict[tuple[str, ...], list[str]] = {}
    still: dict[str, list[str]] = {}
    for name, module in target.lora_layers.items():
        present = {*getattr(module, "lora_A", ()), *getattr(module, "lora_embedding_A", ())}
        active = present.intersection(module.active_adapters)
        trained = {
            match[1]
            for each, parameter in module.named_parameters()
            if parameter.requires_grad and (match := _OF_ADAPTER.match(each))
        }
        if named and active != named & present:
            other.setdefault(tuple(sorted(active)), []).append(name)
        elif trained and (module.disable_adapters or module.merged):
            still.setdefault(
                "the adapter is switched off" if module.disable_adapters else "the adapter is merged", []
            ).append(name)
        for adapter in sorted(trained - active):
            still.setdefault(f"the adapter {adapter!r} can be trained, and is not active", []).append(name)
    for adapters, names in other.items():
        acting = " and ".join(map(repr, adapters)) or "no adapter"
        found = f"{acting} act{'s' * (len(adapters) < 2)} in {names[0]}{and_more(1, len(names))}"
        expected = f"{' and '.join(map(repr, sorted(named)))}, the active_adapter of the model"
        yield Finding("ML321", found, MODEL_PLACE, expected, name="ML321.adapter", fix=_AS_ACTIVE)
        return
    for found, names in still.items():
        found = f"{found}: {names[0]}{and_more(1, len(names))}"
        yield Finding("ML321", found, MODEL_PLACE, "an adapter that acts", name="ML321.adapter", fix=_AS_ACTIVE)


def _scale_findings(target: TrainerTarget) -> Iterator[Finding]:
    """Yield a finding if layers multiply their change by another number than the adapter's configuration gives."""
    from peft.utils.other import get_pattern_key

    wrong: list[tuple[str, float, str]] = []
    for name, module in target.lora_layers.items():
        key = _AROUND.sub("", name)
        parameter = getattr(module, "parameter_name", None)
        key = f"{key}.{parameter}" if parameter else key
        for adapter in module.active_adapters:
            config = target.lora_configs.get(adapter)
            if config is None or adapter not in module.scaling:
                continue
            rank, alpha = (
                patterns.get(get_pattern_key(patterns, key), value)
                for patterns, value in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
            )
            expected, scale = alpha / (math.sqrt(rank) if config.use_rslora else rank), float(module.scaling[adapter])
            if not math.isclose(scale, expected, rel_tol=1e-5):
                divided = f"lora_alpha {alpha:g} / {'√' * bool(config.use_rslora)}r {rank}"
                wrong.append(
                    (f"the change of {name}", scale, f"{expected:g}: {divided} of the adapter's configuration")
                )
    if wrong:
        name, scale, wanted = wrong[0]
        found = f"{name}{and_more(1, len(wrong))} is multiplied by {scale:g}"
        yield Finding("ML321", found, MODEL_PLACE, wanted, name="ML321.scale", fix=_AS_SCALED)


def _rope_findings(target: TrainerTarget) -> Iterator[Finding]:
    """Yield a note if a rotary embedding has other frequencies than one that is made of the configuration."""
    config = target.model.config.get_text_config()
    for module in target.model.get_decoder().modules():
        stored = getattr(module, "original_inv_freq", getattr(module, "inv_freq", None))
        if stored is None or type(getattr(module, "config", None)) is not type(config):
            continue
        own, made = stored.float().cpu(), type(module)(config).inv_freq.float()
        if own.shape != made.shape:
            continue  # another width of a head: the check of the sizes reports it
        apart = (own - made).abs() > _APART * made
        if apart.any():
            at = int(apart.nonzero()[0])
            theta = ModelFacts(config).rope_theta
            expected = f"{made[at]:.3g}, as model.config gives with rope_theta {theta:,}"
            yield Finding("ML328", f"frequency {at} of the rotary embedding is {own[at]:.3g}", MODEL_PLACE, expected)
            return


def _window_findings(target: TrainerTarget) -> Iterator[Finding]:
    """Yield a note if a layer has another window than the configuration gives it."""
    config = target.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    for name, module in target.modules.items():
        index = getattr(module, "layer_idx", None)
        if "sliding_window" not in vars(module) or "vision" in name or index is None or index >= len(kinds):
            continue
        expected = config.sliding_window if kinds[index] == "sliding_attention" else None
        if module.sliding_window != expected:
            found = f"the window of {_AROUND.sub('', name)} is {module.sliding_window}"
            yield Finding("ML328", found, MODEL_PLACE, f"{expected}, as model.config gives")
            return
