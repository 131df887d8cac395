"""Put LoRA on a base model: every requested module or an error, seeded, in float32, nothing else trainable."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import set_seed

from pytest_mistral_lora.checkpoint.architectures import EMBEDDINGS, TARGET_GROUPS, Architecture
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.errors import InputError, RecipeError, TrainingError, and_more, did_you_mean, one_line
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.adapter_config import require_plain_sum
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.training.recipe import Lora

_LOG = logging.getLogger(__name__)
PREFIX = "base_model.model."
"""PEFT's prefix of the names of a base's modules."""

_EXPERTS = {
    "gate",
    "router",
    "experts",
    "shared_experts",
    "block_sparse_moe",
    "w1",
    "w2",
    "w3",
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
}
"""Names of a router and its experts in any version of transformers."""


def adapted_layers(base: BaseFolder, targets: Sequence[str]) -> list[str]:
    """Return the dotted names of the layers of some last names, in model order, without loading weights.

    Only the decoder layers of the text model are searched: the layers of a vision tower have the same names.

    Args:
        base: The base checkpoint.
        targets: Last names of layers, or groups of them: `attention`, `attention+mlp`, `all-linear`.

    Raises:
        RecipeError: If a target is not a linear layer of every decoder layer, or belongs to a router or its experts.
    """
    architecture, place = base.architecture, NOWHERE.within("lora", "target_modules")
    try:
        requested = architecture.targets(targets)
    except ValueError as error:
        expected = f"attention: {', '.join(architecture.text.attention)}"
        raise RecipeError(str(error), place=place, expected=expected) from error
    if not architecture.text.mlp:
        refuse_experts(architecture, requested, place)
    # PEFT accepts a list if any of its names matches, and then trains less than the recipe requests
    modules = base.empty_model().named_modules()
    everywhere = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    names = [name for name in everywhere if name.startswith(f"{architecture.layers}.")]
    # counted, not read: a configuration may leave the number to transformers' default
    layers = sum(name.endswith(".self_attn.o_proj") for name in names)
    matched = {target: [name for name in names if name.endswith(f".{target}")] for target in requested}
    wrong = {target: len(found) for target, found in matched.items() if len(found) != layers}
    if wrong:
        have = dict.fromkeys(map(_last_name, names if architecture.text.mlp else ()), "") or architecture.text.attention
        raise RecipeError(
            "; ".join(
                _mismatch(target, count, everywhere) + ("" if count else did_you_mean(target, have))
                for target, count in wrong.items()
            ),
            place=place,
            expected=f"linear layers that each of the {layers} decoder layers has: {', '.join(have)}; or a group: "
            f"{', '.join(TARGET_GROUPS if architecture.text.mlp else TARGET_GROUPS[:1])}",
        )
    wanted = {name for found in matched.values() for name in found}
    return [name for name in names if name in wanted]


def refuse_experts(architecture: Architecture, targets: Sequence[str], place: Place) -> None:
    """Refuse names of a router or its experts.

    Args:
        architecture: A class with experts.
        targets: Names of layers, dotted or not.
        place: The key that names them.

    Raises:
        RecipeError: With the first.
    """
    for target in targets:
        # also as a part of a dotted name, such as mlp.gate
        if not _EXPERTS.isdisjoint(target.split(".")):
            raise RecipeError(
                f"{target!r} is of a router or its experts in {architecture.title}, which are not trained",
                place=place,
                expected=f"attention: {', '.join(architecture.text.attention)}",
                next_step="Leave it out; target_modules: attention adapts the others.",
            )


def _mismatch(target: str, count: int, everywhere: Sequence[str]) -> str:
    other = next((name for name in everywhere if name.endswith(f".{target}") and ".layers." not in name), "")
    where = f", outside the decoder layers only: {other}" if other and not count else ""
    return f"{target!r} matches {count or 'nothing'}{where}"


def peft_targets(lora: Lora, layers: Sequence[str]) -> list[str]:
    """Return PEFT's `target_modules` for some layers: last names, or full names if other layers have the same.

    Args:
        lora: The recipe's adapter.
        layers: The result of `planned_layers`.
    """
    # Servers and trainers know both forms. A pattern would be shorter, and so would names with `layers_to_transform`,
    # but not all of them take these.
    of_all = lora.layers_to_transform is None and lora.target_pattern is None
    plain = of_all and all(name.startswith("model.layers.") for name in layers)
    return list(dict.fromkeys(_last_name(name) if plain else name for name in layers))


def saved_modules(base: BaseFolder, names: Sequence[str]) -> list[str]:
    """Return the dotted names of the base's modules that are trained and saved in full, without loading weights.

    Raises:
        RecipeError: If no module with its own weights has the name; if PEFT would also match other modules; or if it
            names a router, experts, a module outside the text model, or embeddings that the base ties to its head.
    """
    if not names:
        return []
    architecture, place = base.architecture, NOWHERE.within("lora", "modules_to_save")
    # only modules with their own weights
    modules = [name for name, module in base.empty_model().named_modules() if list(module.parameters(recurse=False))]
    found = {name: [module for module in modules if _last_name(module) == name] for name in names}
    for name, matched in found.items():
        if not matched:
            have = ", ".join(sorted({_last_name(module) for module in modules}))
            raise RecipeError(f"{name!r} matches nothing", place=place, expected=f"some of {have}")
        # PEFT compares ends of dotted names
        if also := [module for module in modules if module.endswith(name) and module not in matched]:
            raise RecipeError(f"{name!r} matches {also[0]} as well in PEFT", place=place)
        if not architecture.text.mlp:
            refuse_experts(architecture, matched, place)
        others = [module for module in matched if module != "lm_head" and not module.startswith(architecture.tower)]
        if others:
            raise RecipeError(f"{others[0]} is outside the text model", place=place, expected="modules of that model")
        if name in EMBEDDINGS and base.is_tied:
            both = " and ".join(other for other in EMBEDDINGS if other != name)
            expected = "neither: trained and saved in full, they would be two"
            raise RecipeError(f"{name!r} is one with {both} in this base", place=place, expected=expected)
    return [module for module in modules if _last_name(module) in names]


def _last_name(name: str) -> str:
    return name.rpartition(".")[2]


def deciding_pattern(patterns: Iterable[str], layer: str) -> str | None:
    """Return the first of some patterns that matches the end of a layer's name, as in PEFT; None if none does."""
    return next((pattern for pattern in patterns if re.fullmatch(rf"(.*\.)?({pattern})", layer)), None)


def _in_saved_order(patterns: Mapping[str, float], layers: Sequence[str]) -> dict[str, float]:
    """Return patterns in the order in which PEFT saves them, sorted, that give each layer the value of the given ones.

    They are the given ones, or else the names of the layers.
    """
    found = {layer: pattern for layer in layers if (pattern := deciding_pattern(patterns, layer)) is not None}
    values = {layer: patterns[pattern] for layer, pattern in found.items()}
    saved = {layer: deciding_pattern(sorted(patterns), layer) for layer in found}
    is_kept = all(pattern is not None and patterns[pattern] == values[layer] for layer, pattern in saved.items())
    kept = patterns if is_kept else {re.escape(layer): value for layer, value in values.items()}
    return {pattern: _whole(value) for pattern, value in sorted(kept.items())}


def lora_config(lora: Lora, layers: Sequence[str]) -> LoraConfig:
    """Return PEFT's configuration of a new adapter on the result of `planned_layers`."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=_whole(lora.alpha),
        rank_pattern=_in_saved_order(lora.rank_pattern or {}, layers),
        alpha_pattern=_in_saved_order(lora.alpha_pattern or {}, layers),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=peft_targets(lora, layers),
        modules_to_save=list(lora.modules_to_save) or None,
        bias="none",
    )


def _whole(number: float) -> float:
    return int(number) if isinstance(number, int) or number.is_integer() else number


def without_weights(base: BaseFolder, config: LoraConfig) -> Any:
    """Return base and adapter as PEFT builds them, on the meta device: layers, names and scaling are PEFT's own."""
    with torch.device("meta"), peft_quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each warning is an error of the caller, or irrelevant without weights
        return get_peft_model(base.empty_model(), config)


def recorded_without_weights(adapter: AdapterFolder, base: BaseFolder) -> Any:
    """Return the result of `without_weights` for an adapter on disk.

    Raises:
        InputError: If the configuration is not that of a plain LoRA adapter, or PEFT refuses it on this base.
    """
    place = Place.of(adapter.config_file)
    config = adapter.lora_config([name for name, _ in base.empty_model().named_modules()])
    require_plain_sum(config.bias, adapter.config.get("init_lora_weights"), place)
    try:
        return without_weights(base, config)
    except Exception as error:  # PEFT raises many types
        raise InputError(f"PEFT refuses it on this base: {one_line(error)}", place=place) from error


def attach_adapter(model: Any, lora: Lora, layers: Sequence[str], *, seed: int) -> Any:
    """Return the base model with a new adapter; `model` is changed in place.

    The random generators are seeded here, before PEFT draws the first values, so the seed alone decides them.

    Args:
        model: The loaded base model.
        lora: The adapter's shape.
        layers: The result of `planned_layers`.
        seed: Seed of the initial values, and of dropout afterwards.

    Raises:
        TrainingError: If the adapter is not exactly on `layers`, or anything else is trainable.
    """
    saved = [name for name, _ in model.named_modules() if _last_name(name) in lora.modules_to_save]
    set_seed(seed)  # PEFT draws the initial values next
    config = lora_config(lora, layers)
    targets = config.target_modules
    with peft_quiet():
        model = get_peft_model(model, config)
    # PEFT shortens a long list of names while it puts the adapter on
    model.peft_config["default"].target_modules = targets
    _train_in_float32(model, saved)
    _check_trainable(model, expected_names(layers, dora=lora.dora, saved=saved))
    if saved:
        wrappers = [model.get_submodule(f"{PREFIX}{name}") for name in saved]
        count = sum(parameter.numel() for wrapper in wrappers for parameter in wrapper.modules_to_save.parameters())
        _LOG.warning(
            "lora.modules_to_save: %s in full makes the adapter larger by %.0f MB (%d numbers)",
            " and ".join(saved),
            count * torch.float32.itemsize / 1e6,
            count,
        )
    return model


def _train_in_float32(model: Any, saved: Sequence[str]) -> None:
    # PEFT makes only LoRA's own tensors float32; a bf16 weight rounds away an update of less than 0.2 % of it
    dtype = model.config.dtype
    for name in saved:
        module = model.get_submodule(f"{PREFIX}{name}").modules_to_save["default"].float()
        if dtype != torch.float32:
            # an embedding gets ids, a head gets hidden states
            module.register_forward_pre_hook(
                lambda module, args: tuple(value.float() if value.is_floating_point() else value for value in args)
            )
            module.register_forward_hook(lambda module, args, output: output.to(dtype))


ATTENDED = 3
"""Input tokens from which a row trains every layer: a token that attends to itself alone trains no query and no key."""


def refuse_layers_without_gradient(model: Any) -> None:
    """Refuse an adapter if a layer got no gradient, or only zeros; every process must call this.

    Args:
        model: The model after a backward pass.

    Raises:
        TrainingError: With the first layer, and the number of others.
    """
    idle = []
    for name, parameter in model.named_parameters():
        # B is zero at the start, so that A has a gradient of zeros until B has moved
        if parameter.requires_grad and ".lora_A." not in name:
            gradient = parameter.grad
            # a part of a sharded gradient may be zero: take the norm of the whole
            norm = None if gradient is None else torch.linalg.vector_norm(gradient.detach())
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if norm is None or norm == 0:
                idle.append(name.partition(".lora_")[0].removeprefix("base_model.model."))
    if idle:
        raise TrainingError(
            f"{idle[0]} gets no gradient{and_more(1, len(idle))}: it would not be trained",
            place=NOWHERE.within("lora", "target_modules"),
            expected="a gradient in each adapted layer",
            next_step="Leave it out of target_modules; or set training.dry_run: false, if only the first step has none,"
            " as has a new block whose last weights are zero.",
        )


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of the adapter's tensors on the CPU, named as in `adapter_model.safetensors`.

    Sharded tensors are gathered: every process must call this. The base's weights stay where they are.
    """
    # ds_id is DeepSpeed's mark of a parameter that ZeRO-3 has sharded; FSDP2 makes each a DTensor
    by_zero = [parameter for parameter in model.parameters() if parameter.requires_grad and hasattr(parameter, "ds_id")]
    gathered: AbstractContextManager[Any] = nullcontext()
    if by_zero:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(by_zero)
    found = {}
    with gathered:
        # with "auto", PEFT asks the Hub for the base's configuration
        for name, tensor in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items()):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found[name] = whole.detach().to("cpu", copy=True).contiguous()
    return found


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the base model's own tensors under the names of its checkpoint; not copies."""
    return {
        name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def expected_names(layers: Sequence[str], *, dora: bool = False, saved: Sequence[str] = ()) -> set[str]:
    """Return the tensor names of an adapter, as in `adapter_model.safetensors`.

    Args:
        layers: The adapted layers; each has two tensors.
        dora: Whether each has its magnitudes as well.
        saved: The modules that are saved in full; a module of a Mistral model has one tensor.
    """
    names = {f"{PREFIX}{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    magnitudes = {f"{PREFIX}{layer}.lora_magnitude_vector" for layer in layers if dora}
    return names | magnitudes | {f"{PREFIX}{module}.weight" for module in saved}


@contextmanager
def peft_quiet() -> Iterator[None]:
    """Silence warnings of PEFT, within the block, that no user can act on."""
    with warnings.catch_warnings():
        # PEFT still uses a name of checkpointing that transformers 5 deprecates
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # PEFT 0.18 takes the embeddings of every Mistral model for tied; `saved_modules` has refused tied ones
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*", category=UserWarning)
        yield


def _check_trainable(model: Any, expected: set[str]) -> None:
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # PEFT saves a parameter without the adapter's name
    found = {
        name.replace(".modules_to_save.default.", ".")
        .replace(".default.", ".")
        .replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
        for name in trainable
    }
    if found != expected:
        odd = sorted(found ^ expected)
        raise TrainingError(f"the trainable tensors are not the adapter's: {', '.join(odd[:5])}")
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            raise TrainingError(f"{name} is {parameter.dtype}", expected="a float32 adapter")
