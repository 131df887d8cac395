"""The tensors of a merged model, each held to its definition: the base's plus the adapter's change, rounded once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_mistral_lora.checkpoint.architectures import spelled_name
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_config import match_counts, patterns_of, require_supported
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]

_PREFIX = "base_model.model."

_KINDS = ({""}, {"A.weight", "B.weight"}, {"A.weight", "B.weight", "magnitude_vector"})
"""The tensors of one change: one that was trained in full, LoRA's and DoRA's."""

_BITS = {"float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24)}
"""Significant bits of a dtype, and the exponent of two of its smallest number."""

_HALF = 0.5 + 2**-12
"""Largest distance from the exact sum, in units in the last place: half a unit, and a share for a sum in float64 that
is a float32 on its way to 16 bits, and so is rounded twice."""

_NOISE = 2.0**-48
"""Largest difference of two sums of the same terms in float64, as a share of the largest term."""

_BLOCK = 2**20
"""Elements that are summed at once: 8 MiB in float64."""


@dataclass(frozen=True, slots=True)
class InexactTensor:
    """A tensor of a merged model that is not the rounded sum of the base's tensor and the adapter's change.

    Attributes:
        name: Its name in the merged files.
        different: Number of its elements that are not.
        elements: Number of all its elements.
        farthest: Largest distance of an element from the exact sum, in units in the last place.
    """

    name: str
    different: int
    elements: int
    farthest: float

    def __str__(self) -> str:
        return (
            f"{self.name} is not the rounded sum of base and adapter in {self.different:,} of {self.elements:,} "
            f"elements, by up to {self.farthest:.3g} units in the last place"
        )


@dataclass(frozen=True, slots=True)
class NamedChange:
    """The change of one tensor, by the names of an adapter's tensors and `adapter_config.json` alone.

    The merge's own rule takes scales and places from PEFT, and computes in torch: with a mistake in either, a proof by
    the same rule would agree with it.

    Attributes:
        tensors: The adapter's tensors.
        names: Their names by the part that they are: `A.weight`, `B.weight`, with DoRA `magnitude_vector`; or empty for
            a tensor that takes the place of the base's.
        scaling: Factor of B A.
    """

    tensors: Weights
    names: Mapping[str, str]
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that it changes."""
        shapes = {part: self.tensors.infos[name].shape for part, name in self.names.items()}
        return shapes[""] if "" in shapes else (shapes["B.weight"][0], shapes["A.weight"][1])

    def sums(self, weight: Array, rows: slice) -> tuple[Array, float]:
        """Return rows of the merged tensor in float64, and a bound of the terms that are added."""
        import numpy as np

        parts = {part: self.tensors.array(name).astype(np.float64) for part, name in self.names.items()}
        if "" in parts:
            return parts[""].reshape(len(weight), -1)[rows], 0.0
        # W' = W + s B A; with DoRA (arXiv:2402.09353), row i of W' then gets the length m_i
        own, a, b = weight[rows].astype(np.float64), parts["A.weight"], parts["B.weight"][rows] * self.scaling
        merged, largest = own + b @ a, [float(np.abs(one).max(initial=0.0)) for one in (own, a, b)]
        terms = largest[0] + len(a) * largest[1] * largest[2]
        if "magnitude_vector" in parts:
            factors = parts["magnitude_vector"].reshape(-1)[rows] / np.linalg.norm(merged, axis=1)
            merged, terms = merged * factors[:, None], terms * float(np.abs(factors).max(initial=0.0))
        return merged, terms


def changes_by_names(adapter: AdapterFolder, base: Weights) -> dict[str, NamedChange]:
    """Return the change of each tensor that an adapter changes, by its name in the base's files if it is there.

    Raises:
        InputError: If the adapter has a part of a change alone, or one that is not LoRA's or DoRA's; if its file leads
            out of its folder; if its configuration is not supported, or a pattern of it takes too long; or as for
            `Weights`.
    """
    tensors, config = adapter.weights, adapter.config
    require_supported(config, str(adapter.config_file))
    found = dict[str, dict[str, str]]()
    for name in tensors:
        layer, _, part = name.removeprefix(_PREFIX).partition(".lora_")
        found.setdefault(f"{layer}.weight" if part else layer, {})[part] = name
    for parts in found.values():
        if set(parts) not in _KINDS:
            place = str(adapter.tensors_file)
            raise InputError(f"only {' and '.join(parts.values())}", place=place, expected="A and B of each layer")
    alphas = {regex: one for (key, one), regex in patterns_of(config).items() if key == "alpha_pattern"}
    layers = [name.removesuffix(".weight") for name in found]
    match_counts(list(alphas), layers, str(adapter.config_file))  # a pattern of unknown origin may run for ever
    # in a wrapper, tensors have other names on disk than in an adapter
    on_disk, changes = {spelled_name(name, base): name for name in base}, {}
    for layer, (name, parts) in zip(layers, found.items(), strict=True):
        matching = [one for regex, one in alphas.items() if re.fullmatch(regex, layer)]
        alpha = config["alpha_pattern"][matching[0]] if matching else config["lora_alpha"]
        rank = _rank(tensors, parts) if "A.weight" in parts else 1
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        changes[on_disk.get(spelled_name(name, base), name)] = NamedChange(tensors, parts, scaling)
    return changes


def _rank(tensors: Weights, parts: Mapping[str, str]) -> int:
    a, b = (tensors.infos[parts[part]].shape for part in ("A.weight", "B.weight"))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        found = f"{parts['A.weight']} has shape {list(a)}, and B {list(b)}"
        raise InputError(found, place=str(tensors.files[0]), expected="(rank, inputs) and (outputs, rank)")
    return a[0]


def inexact_tensors(merged: Weights, base: Weights, adapter: AdapterFolder) -> Iterator[InexactTensor]:
    """Yield each tensor of a merged model that is not what base and adapter define, by sums in float64.

    Args:
        merged: The merged tensors.
        base: The base's, in full precision.
        adapter: The adapter.

    Raises:
        InputError: If both do not have the same tensors, the adapter has one without a place among them, or the merged
            ones are in a dtype that no merge writes.
    """
    changes, place = changes_by_names(adapter, base), str(merged.files[0].parent)
    if odd := sorted((merged.keys() ^ base.keys()) | (changes.keys() - base.keys())):
        raise InputError(f"{odd[0]} is not in base and merged model", place=place, expected="the same tensors")
    for name, info in merged.infos.items():
        if info.shape != base.infos[name].shape or info.dtype_name not in _BITS:
            found = f"{name} is a tensor of {info.dtype_name} {list(info.shape)}"
            expected = f"{list(base.infos[name].shape)} in {', '.join(_BITS)}"
            raise InputError(found, place=str(info.file), expected=expected)
        change = changes.get(name)
        if change is not None and change.shape != info.shape:
            found = f"{next(iter(change.names.values()))} is for a tensor of shape {list(change.shape)}"
            raise InputError(found, place=str(adapter.tensors_file), expected=f"{list(info.shape)}, as {name}")
        different, farthest = _distance(merged.array(name), base.array(name), change, *_BITS[info.dtype_name])
        if different:
            yield InexactTensor(name, different, info.size, farthest)


def is_rounded_sum(merged: AdapterFolder, base: BaseFolder, adapter: AdapterFolder) -> bool | str:
    """Return whether a merged model is what base and adapter define; if not, the first tensor that is not, in words.

    Raises:
        PinError: As for `BaseFolder.weights`.
        InputError: As for `inexact_tensors`.
    """
    wrong = inexact_tensors(merged.checkpoint.file_weights, base.weights, adapter)
    return next(map(str, wrong), True)


def _distance(found: Array, weight: Array, change: NamedChange | None, bits: int, lowest: int) -> tuple[int, float]:
    """Return the number of elements that are not the rounded sum, and the farthest one's units in the last place."""
    import numpy as np

    if change is None and found.dtype == weight.dtype and found.tobytes() == weight.tobytes():
        return 0, 0.0
    found, weight = (one.reshape(len(one) if one.ndim else 1, -1) for one in (found, weight))
    different, farthest, step = 0, 0.0, max(1, _BLOCK // max(1, found.shape[1]))
    for start in range(0, len(found), step):
        rows = slice(start, start + step)
        with np.errstate(all="ignore"):  # of weights that are not finite, or of rows of zeros under DoRA
            exact, terms = (weight[rows].astype(np.float64), 0.0) if change is None else change.sums(weight, rows)
            apart = np.abs(found[rows].astype(np.float64) - exact)
            unit = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - bits, lowest))
            wrong = ~(apart <= _HALF * unit + _NOISE * terms)  # a distance that is no number is wrong, too
            different += int(wrong.sum())
            farthest = max(farthest, float(np.nan_to_num(apart / unit, nan=math.inf)[wrong].max(initial=0.0)))
    return different, farthest
