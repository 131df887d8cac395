"""The tensors of a merged model, each compared with its definition: the base's plus the delta, rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.lora_delta import LoraDelta, deltas_of

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]

_BITS = {"float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24)}
"""Significant bits of a dtype, and the exponent of two of its smallest number."""

_HALF = 0.5 + 2**-12
"""Largest distance from the exact sum, in units in the last place: half a unit, and a share for sums that were rounded
to float32 before 16 bits, and so twice."""

_NOISE = 2.0**-48
"""Largest difference of two sums of the same terms in float64, as a share of the largest term."""

_BLOCK = 2**20
"""Elements that are summed at once: 8 MiB in float64."""


@dataclass(frozen=True, slots=True)
class InexactTensor:
    """A tensor of a merged model that is not the rounded sum of the base's tensor and the adapter's delta.

    Attributes:
        name: Its name in the merged files.
        different: Number of elements that are not the rounded sum.
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


def inexact_tensors(merged: Weights, base: Weights, adapter: AdapterFolder) -> Iterator[InexactTensor]:
    """Yield each tensor of a merged model that differs from what base and adapter define, by sums in float64.

    Args:
        merged: The merged tensors.
        base: The base's tensors, in full precision.
        adapter: The adapter.

    Raises:
        InputError: If the two models do not have the same tensors, the adapter changes a tensor that they do not have,
            or the merged tensors are in a dtype that no merge writes.
    """
    deltas, place = deltas_of(adapter, base), Place.of(merged.files[0].parent)
    if odd := sorted((merged.keys() ^ base.keys()) | (deltas.keys() - base.keys())):
        raise InputError(f"{odd[0]} is not in base and merged model", place=place, expected="the same tensors")
    for name, info in merged.infos.items():
        if info.shape != base.infos[name].shape or info.dtype_name not in _BITS:
            found = f"{name} is a tensor of {info.dtype_name} {list(info.shape)}"
            expected = f"{list(base.infos[name].shape)} in {', '.join(_BITS)}"
            raise InputError(found, place=str(info.file), expected=expected)
        delta = deltas.get(name)
        if delta is not None and delta.shape != info.shape:
            found = f"{delta.names[0]} is for a tensor of shape {list(delta.shape)}"
            raise InputError(found, place=str(adapter.tensors_file), expected=f"{list(info.shape)}, as {name}")
        different, farthest = _distance(merged.array(name), base.array(name), delta, *_BITS[info.dtype_name])
        if different:
            yield InexactTensor(name, different, info.size, farthest)


def is_rounded_sum(merged: AdapterFolder, base: BaseFolder, adapter: AdapterFolder) -> bool | str:
    """Return whether a merged model is what base and adapter define; if not, also the first wrong tensor, in words.

    Raises:
        PinError: As for `BaseFolder.weights`.
        InputError: As for `inexact_tensors`.
    """
    wrong = inexact_tensors(merged.checkpoint.file_weights, base.weights, adapter)
    return next(map(str, wrong), True)


def _distance(found: Array, weight: Array, delta: LoraDelta | None, bits: int, lowest: int) -> tuple[int, float]:
    """Return the number of elements that are not the rounded sum, and the farthest one's units in the last place."""
    import numpy as np

    if delta is None and found.dtype == weight.dtype and found.tobytes() == weight.tobytes():
        return 0, 0.0
    found, weight = (tensor.reshape(len(tensor) if tensor.ndim else 1, -1) for tensor in (found, weight))
    different, farthest, step = 0, 0.0, max(1, _BLOCK // max(1, found.shape[1]))
    for start in range(0, len(found), step):
        rows = slice(start, start + step)
        with np.errstate(all="ignore"):  # weights that are not finite, or rows of zeros under DoRA
            exact, terms = (weight[rows].astype(np.float64), 0.0) if delta is None else delta.sums(weight, rows)
            apart = np.abs(found[rows].astype(np.float64) - exact)
            unit = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - bits, lowest))
            wrong = ~(apart <= _HALF * unit + _NOISE * terms)  # NaN is wrong, too
            different += int(wrong.sum())
            farthest = max(farthest, float(np.nan_to_num(apart / unit, nan=math.inf)[wrong].max(initial=0.0)))
    return different, farthest
