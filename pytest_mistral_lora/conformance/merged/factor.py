"""The factor by which an adapter was merged, from the numbers that were rounded to another neighbour.

Each number of a merge is rounded by up to half a unit, which hides a factor of 1.001 in one number, and not in a layer.
Let R be the rounded sum W + D, with D = s B A, and M the merged weight. If the factor is 1, M differs from R where
rounding errors before the last one moved a sum across the middle of two neighbours: as often with the sign of D as
against it. If it is larger, the differences have the sign of D. So for the differing numbers

    t = Σ D (M - R),    v = Σ (D (M - R))²,    g = Σ D (R₁₊ₑ - R₁₋ₑ) / 2e

the factor is 1 + t / g with a standard error of √v / g, R₁₊ₑ being the rounded sum of W and (1 + e) D. Base weights are
on the grid of their dtype, and a change of less than half a unit is lost: hence g, and not Σ D².
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pytest_mistral_lora.conformance.merged.weights import row_blocks
from pytest_mistral_lora.records.lora_delta import LoraDelta

Array: TypeAlias = npt.NDArray[Any]

_STEP = 2.0**-6
"""e: the step of the difference quotient."""

_ERRORS = 6
"""Standard errors that a factor must be away from 1."""

_LEAST = 2.5e-4
"""Smallest deviation of a factor that counts."""

_ROUNDED = 2.0**-8 / math.sqrt(3)
"""Standard error of a number that is rounded to bfloat16, as a share of it: A and B may have been, in any merge."""

_NARROW = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
_SMALL = 1 << 16
"""Most numbers of a layer that may be too small to show a factor by itself."""

_CHUNK = 1 << 21
"""Numbers to compare at a time: 16 MiB in float64."""


@dataclass(frozen=True, slots=True)
class FactorSums:
    """The sums over the numbers of one layer or several, and the factor that they give.

    Attributes:
        numbers: How many numbers were compared.
        different: How many differ from the rounded sum R.
        trend: t.
        variance: v.
        slope: g; 0.0 if it was not computed: in a large layer whose differences are as often against the change.
        spread: The variance of t if A and B were rounded to bfloat16; 0.0 without the slope.
    """

    numbers: int = 0
    different: int = 0
    trend: float = 0.0
    variance: float = 0.0
    slope: float = 0.0
    spread: float = 0.0

    def __add__(self, other: FactorSums) -> FactorSums:
        """Return the sums over the numbers of both."""
        return FactorSums(
            self.numbers + other.numbers,
            self.different + other.different,
            self.trend + other.trend,
            self.variance + other.variance,
            self.slope + other.slope,
            self.spread + other.spread,
        )

    @property
    def is_aside(self) -> bool:
        """Whether the differences follow the adapter's change, beyond chance."""
        return abs(self.trend) > _ERRORS * math.sqrt(self.variance)

    @property
    def factor(self) -> float:
        """The factor; 1.0 if it was not computed."""
        return 1 + self.trend / self.slope if self.slope > 0 else 1.0

    @property
    def is_wrong(self) -> bool:
        """Whether the factor is not 1, beyond the rounding of every number and of A and B."""
        if not self.is_aside or self.slope <= 0:
            return False
        return abs(self.factor - 1) > max(_LEAST, _ERRORS * math.sqrt(self.spread) / self.slope)


@dataclass(frozen=True, slots=True)
class Reference:
    """What was rounded to the dtype of the merge before the sum.

    Attributes:
        base: The base's weight.
        factors: A and B.
        scale: The scale.
        change: The product.
    """

    base: bool = False
    factors: bool = False
    scale: bool = False
    change: bool = False


class MergeFactor:
    """The factor of the layers of one merge, which were all rounded in the same way."""

    def __init__(self) -> None:
        self._reference: Reference | None = None

    def sums(self, merged: Array, weight: Array, delta: LoraDelta) -> FactorSums:
        """Return the sums of one layer.

        The reference is the one that leaves the fewest differences in the first layer; but a factor is wrong only if it
        is so for every reference.

        Args:
            merged: The merged tensor, `(outputs, inputs)`.
            weight: The base's, `(outputs, inputs)`.
            delta: The adapter's change: a product, without magnitudes.
        """
        dtype = _dtype_of_merge(merged)
        references = list(_references(weight, delta, dtype))
        if self._reference not in references:
            self._reference = _closest(merged, weight, delta, dtype, references)
        found = _sums(merged, weight, delta, dtype, self._reference)
        if found.is_wrong:
            for reference in references:
                other = _sums(merged, weight, delta, dtype, reference)
                if not other.is_wrong:
                    return other
        return found


def _references(weight: Array, delta: LoraDelta, dtype: Any) -> Iterator[Reference]:
    """Yield each way to round before a sum in a dtype, without those that change nothing."""
    is_narrow = dtype in _NARROW
    rounds_base = is_narrow and not _fits(weight, dtype)
    rounds_scale = is_narrow and float(np.array(delta.scaling).astype(dtype)) != delta.scaling
    choices = [(False, True) if rounds else (False,) for rounds in (rounds_base, is_narrow, rounds_scale, is_narrow)]
    return (Reference(*choice) for choice in product(*choices))


def _closest(
    merged: Array, weight: Array, delta: LoraDelta, dtype: Any, references: Sequence[Reference]
) -> Reference:  # fmt: skip
    fewest, closest = math.inf, references[0]
    for reference in references:
        different = _sums(merged, weight, delta, dtype, reference).different
        if different < fewest:
            fewest, closest = different, reference
        if not different:
            break
    return closest


def _sums(merged: Array, weight: Array, delta: LoraDelta, dtype: Any, reference: Reference) -> FactorSums:
    """Return the sums of one layer for one reference; in a large layer, the slope only if it is needed."""
    a, b = delta.factors()
    if reference.factors:
        a, b = (_rounded(factor, dtype) for factor in (a, b))
    b *= float(np.array(delta.scaling).astype(dtype)) if reference.scale else delta.scaling
    sums = FactorSums()
    for rows in row_blocks(len(weight), weight[0].size, _CHUNK):
        old, change = _terms(weight[rows], a, b[rows], dtype, reference)
        with np.errstate(all="ignore"):  # numbers that are not finite
            expected, found = (old + change).astype(np.float32).astype(dtype), merged[rows].astype(dtype)
            # most numbers of most merges are equal: only the others are computed with
            at = np.nonzero(expected != found)
            products = change[at] * (found[at].astype(np.float64) - expected[at].astype(np.float64))
            trend, variance = float(products.sum()), float(np.sum(products * products))
            sums += FactorSums(found.size, len(products), trend, variance)
    if not sums.is_aside and sums.numbers > _SMALL:
        return sums
    slope = 0.0
    for rows in row_blocks(len(weight), weight[0].size, _CHUNK):
        old, change = _terms(weight[rows], a, b[rows], dtype, reference)
        with np.errstate(all="ignore"):
            above, below = (_rounded(old + (1 + step) * change, dtype) for step in (_STEP, -_STEP))
            slope += float(np.sum(change * (above - below))) / (2 * _STEP)
    return replace(sums, slope=slope, spread=(slope * _ROUNDED) ** 2 * _sensitivity(a, b))


def _sensitivity(a: Array, b: Array) -> float:
    """Return the variance of the factor of B A, for independent relative errors of variance 1 in the numbers of both.

    An error of a number x changes the factor by x ∂(<B A, D> / <D, D>) / ∂x, with D = B A.
    """
    of_a, of_b = a @ a.T, b.T @ b
    square = float(np.sum(of_a * of_b))
    changes = (a * (of_b @ a), b * (b @ of_a))
    return sum(float(np.sum(change * change)) for change in changes) / square**2 if square else 0.0


def _terms(weight: Array, a: Array, b: Array, dtype: Any, reference: Reference) -> tuple[Array, Array]:
    """Return the base's weights and the change of some rows, in float64, as they are before the sum."""
    old = weight.astype(np.float64)
    with np.errstate(all="ignore"):
        change = b @ a
    return (
        _rounded(old, dtype) if reference.base else old,
        _rounded(change, dtype) if reference.change else change,
    )


def _dtype_of_merge(merged: Array) -> Any:
    """Return the dtype in which a tensor was merged: a narrower one than that of its file if every number fits."""
    # the numbers decide: weights in float32 may have been merged in bfloat16
    return next((dtype for dtype in _NARROW if _fits(merged, dtype)), merged.dtype)


def _fits(values: Array, dtype: Any) -> bool:
    if values.dtype == dtype:
        return True
    return all(
        np.array_equal(values[rows].astype(dtype).astype(values.dtype), values[rows])
        for rows in row_blocks(len(values), values[0].size, _CHUNK)
    )


def _rounded(values: Array, dtype: Any) -> Array:
    """Return float64 numbers, rounded to float32 and then to a dtype, as torch rounds a sum in 16 bits."""
    return values.astype(np.float32).astype(dtype).astype(np.float64)
