"""The layers that a recipe adapts, by names, indices and patterns, with the rank and the alpha of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from pytest_mistral_lora.checkpoint.architectures import TARGET_GROUPS
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.errors import InputError, RecipeError, and_more, counted, did_you_mean
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.adapter_config import match_counts, patterns_of
from pytest_mistral_lora.training.adapter import adapted_layers, deciding_pattern, refuse_experts
from pytest_mistral_lora.training.recipe import Lora

_LORA = NOWHERE / "lora"


def planned_layers(base: BaseFolder, lora: Lora) -> list[str]:
    """Return the dotted names of the base's layers that a recipe adapts, in model order, without loading weights.

    Args:
        base: The base checkpoint.
        lora: The recipe's adapter.

    Raises:
        RecipeError: As for `adapted_layers`; if an index is not that of a decoder layer; or if a pattern of ranks or
            alphas decides no layer.
    """
    pattern = lora.target_pattern
    layers = adapted_layers(base, lora.target_modules) if pattern is None else _matched_layers(base, pattern)
    of_all, chosen = layers, lora.layers_to_transform
    if chosen is not None:
        depth = decoder_layers(base)
        if beyond := [index for index in chosen if index >= depth]:
            raise RecipeError(
                f"{beyond[0]}{and_more(1, len(beyond))}: the base has {counted(depth, 'decoder layer')}",
                place=_LORA / "layers_to_transform",
                expected=f"indices from 0 to {depth - 1}",
            )
        layers = [name for name in layers if _index_of(base, name) in chosen]
    _require_deciding_patterns(base, lora, layers, of_all)
    return layers


def decoder_layers(base: BaseFolder) -> int:
    """Return the number of a base's decoder layers."""
    # of the model: a configuration may leave the number to transformers' default
    number: int = base.model_config().get_text_config().num_hidden_layers
    return number


def _index_of(base: BaseFolder, layer: str) -> int:
    return int(layer.removeprefix(f"{base.architecture.layers}.").partition(".")[0])


def _matched_layers(base: BaseFolder, pattern: str) -> list[str]:
    """Return the layers whose full names match a regular expression, in model order.

    Raises:
        RecipeError: If it matches none, a module outside the decoder layers, or a router or its experts, or takes too
            long.
    """
    architecture, place = base.architecture, _LORA / "target_modules"
    found = [(name, module) for name, module in base.empty_model().named_modules() if [*module.parameters(False)]]
    modules = [name for name, _ in found]
    _require_quick({"target_modules": pattern}, modules, place)
    linear = [name for name, module in found if isinstance(module, torch.nn.Linear)]
    inside = [name for name in linear if name.startswith(f"{architecture.layers}.")]
    matched = [name for name in modules if re.fullmatch(pattern, name)]
    if not architecture.text.mlp:
        refuse_experts(architecture, matched, place)
    example = rf"{re.escape(architecture.layers)}\.(0|1)\.self_attn\.{architecture.text.attention[0]}"
    # PEFT would adapt, or refuse, these as well
    outside = [name for name in matched if name not in inside]
    if outside:
        raise RecipeError(
            f"{pattern!r} matches {outside[0]} as well{and_more(1, len(outside))}",
            place=place,
            expected=f"a pattern of linear layers of the text's decoder alone, such as {example}",
        )
    if not matched:
        raise RecipeError(
            f"{pattern!r} matches nothing",
            place=place,
            expected=f"a regular expression of the full names of layers, such as {example}; names; or a group: "
            f"{', '.join(TARGET_GROUPS if architecture.text.mlp else TARGET_GROUPS[:1])}",
        )
    return matched


def _require_quick(patterns: Mapping[str, Any], names: Sequence[str], place: Place) -> None:
    """Refuse patterns that take too long on some names.

    Raises:
        RecipeError: With the patterns.
    """
    try:
        match_counts(list(patterns_of(patterns).values()), names, place)
    except InputError as error:
        raise RecipeError(error.found, place=place, expected=error.expected) from error


def _require_deciding_patterns(base: BaseFolder, lora: Lora, layers: Sequence[str], of_all: Sequence[str]) -> None:
    """Refuse patterns of ranks and alphas that PEFT would ignore.

    Args:
        base: The base checkpoint.
        lora: The recipe's adapter.
        layers: The adapted layers.
        of_all: Those that it would have with every decoder layer.

    Raises:
        RecipeError: If a pattern decides no layer, or takes too long.
    """
    for key in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, float] = getattr(lora, key) or {}
        if not patterns:
            continue
        place = _LORA / key
        everywhere = [name for name, _ in base.empty_model().named_modules() if name]
        _require_quick({key: patterns}, everywhere, place)
        deciding = {layer: deciding_pattern(patterns, layer) for layer in layers}
        for pattern in patterns:
            if pattern in deciding.values():
                continue
            matched = [name for name in everywhere if deciding_pattern([pattern], name) is not None]
            expected = f"the end of the name of a layer with an adapter, such as {layers[0].partition('.layers.')[2]}"
            raise RecipeError(
                f"{pattern!r} {_why_it_decides_nothing(pattern, patterns, matched, layers, of_all, lora)}",
                place=place,
                expected=expected,
            )


def _why_it_decides_nothing(
    pattern: str,
    patterns: Mapping[str, float],
    matched: Sequence[str],
    layers: Sequence[str],
    of_all: Sequence[str],
    lora: Lora,
) -> str:
    adapted = [name for name in matched if name in layers]
    if adapted:
        return f"is never used: {deciding_pattern(patterns, adapted[0])!r}, before it, matches {adapted[0]} as well"
    left_out = [name for name in matched if name in of_all]
    if left_out:
        return f"matches {left_out[0]}, which layers_to_transform {list(lora.layers_to_transform or ())} leaves out"
    if matched:
        targets = ", ".join(lora.target_modules)
        return f"matches {matched[0]}, which has no adapter: target_modules is {targets}"
    return f"matches nothing{did_you_mean(pattern, [layer.rpartition('.')[2] for layer in layers])}"


def ranks_and_alphas(lora: Lora, layers: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Return the rank and the alpha of each layer, by its name.

    Args:
        lora: The recipe's adapter.
        layers: The result of `planned_layers`.
    """
    ranks, alphas = lora.rank_pattern or {}, lora.alpha_pattern or {}
    found = {}
    for layer in layers:
        by_rank, by_alpha = deciding_pattern(ranks, layer), deciding_pattern(alphas, layer)
        rank = lora.r if by_rank is None else ranks[by_rank]
        found[layer] = rank, lora.alpha if by_alpha is None else alphas[by_alpha]
    return found


def layers_text(base: BaseFolder, lora: Lora, layers: Sequence[str]) -> str:
    """Return the adapted layers in words, each kind once; with ranks and alphas if patterns choose them.

    Args:
        base: The base checkpoint.
        lora: The recipe's adapter.
        layers: The result of `planned_layers`.
    """
    depth = decoder_layers(base)
    if not (lora.rank_pattern or lora.alpha_pattern):
        return _kinds_text(layers, depth)
    groups: dict[tuple[int, float], list[str]] = {}
    for layer, shape in ranks_and_alphas(lora, layers).items():
        groups.setdefault(shape, []).append(layer)
    texts = (f"rank {rank}, alpha {alpha:g}: {_kinds_text(group, depth)}" for (rank, alpha), group in groups.items())
    return "; ".join(texts)


def _kinds_text(layers: Sequence[str], depth: int) -> str:
    kinds: dict[tuple[str, str], list[int]] = {}
    for layer in layers:
        before, index, after = re.split(r"\.layers\.(\d+)\.", layer, maxsplit=1)
        kinds.setdefault((before, after), []).append(int(index))
    texts = []
    for (before, after), indices in kinds.items():
        which = "*" if len(indices) == depth else _ranges(indices)
        texts.append(f"{before}.layers.{which}.{after}")
    return ", ".join(texts)


def _ranges(indices: Sequence[int]) -> str:
    """Return indices as a name has them: `3`, or `{0-3,7}` for several."""
    if len(indices) == 1:
        return str(indices[0])
    runs = [[index for _, index in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) + "}"
