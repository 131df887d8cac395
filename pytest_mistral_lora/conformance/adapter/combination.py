"""Adapters that are sums of others: their weights, by least squares over the changes of each layer.

A change s B A is never multiplied out: the inner product of two of them is the sum of (BᵢᵀBⱼ) ∘ (AᵢAⱼᵀ), which has
the size of their ranks. One pass over the tensors is enough for all adapters, and memory holds one layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.lora_delta import LoraDelta, deltas_of

Array: TypeAlias = npt.NDArray[np.float64]

Kind = Literal["sum", "cut", "crossed"]
"""`sum`: Σ wᵢ Dᵢ, with D = s B A; `cut`: such a sum, cut to the rank of the adapter; `crossed`: Σ cᵢⱼ Bᵢ Aⱼ, as from
factors that were summed before they are multiplied."""

Term: TypeAlias = tuple[int, int]
"""B of the first adapter times A of the second, by their positions among all."""

MOST_RANKS = 2048
"""Most ranks of all adapters together in one layer: its inner products take 64 MiB."""

_MOST_CROSSED = 6
"""Most adapters whose factors are tried in all pairs."""

_ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Largest rounding error of a number, as a share of it."""

_FLOOR = 1e-4
"""Largest share of a change that sums and decompositions in float32 may get wrong."""

_ROUNDINGS = 4
"""Roundings of a factor that may add up: A and B of the sources, and of the sum."""

_LEAST_SINGULAR = 1e-9
"""Smallest singular value of inner products that counts, as a share of the largest."""

_SAME = 1e-12
"""Largest squared distance of equal factors, as a share of their squares: the inner products are in float64."""

_LARGEST = 1e30
"""The first number that is too large: the squares of products must not overflow."""

_TRAINED_ON = 0.5
"""Least cosine between a sum and a layer that was trained on from it: two trained adapters hardly have one."""

_MOST_SOUGHT = 5
"""Most layers whose factors are sought among those of the other layers."""


@dataclass(frozen=True)
class Member:
    """One of the adapters that are compared.

    Attributes:
        name: Its name for people.
        folder: Its folder.
        deltas: Its changes of low rank, by the name of the tensor that changes.
    """

    name: str
    folder: AdapterFolder
    deltas: Mapping[str, LoraDelta]

    @classmethod
    def read(cls, name: str, folder: AdapterFolder) -> Member:
        """Return the changes of an adapter.

        Raises:
            InputError: As for `deltas_of`, or if it has no change of low rank.
        """
        deltas = {layer: delta for layer, delta in deltas_of(folder, Weights([])).items() if delta.is_low_rank}
        if not deltas:
            raise InputError("no change of low rank", place=str(folder.tensors_file))
        return cls(name, folder, deltas)

    @property
    def rank(self) -> int:
        """The highest rank of a layer."""
        return max(delta.rank for delta in self.deltas.values())

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is DoRA: learned lengths of rows, which no sum of products has."""
        return any(delta.has_magnitude for delta in self.deltas.values())

    @property
    def is_like_combined(self) -> bool:
        """Whether its configuration is one that PEFT gives a combined adapter: alpha equal to r, and no patterns."""
        config = self.folder.config
        has_patterns = config.get("alpha_pattern") or config.get("rank_pattern")
        return bool(config["r"] == config["lora_alpha"] and not has_patterns)

    @cached_property
    def roundoff(self) -> float:
        """Largest rounding error of a number of its tensors, as a share of it."""
        return max(_ROUNDOFF.get(info.dtype, 0.0) for info in self.folder.tensors.values())


@dataclass(frozen=True)
class System:
    """The normal equations of the fit of one adapter by a sum, in one layer.

    Attributes:
        terms: The terms that this layer has, n of them.
        gram: Their inner products, `(n, n)`.
        inner: Those with the fitted adapter, `(n,)`.
        square: The fitted adapter's squared norm.
    """

    terms: tuple[Term, ...]
    gram: Array
    inner: Array
    square: float

    def solved(self) -> dict[Term, float]:
        """Return the weights of the best fit."""
        sizes = np.sqrt(np.diag(self.gram))
        scaled = self.gram / np.outer(sizes, sizes)
        found = np.linalg.lstsq(scaled, self.inner / sizes, rcond=_LEAST_SINGULAR)[0] / sizes
        return dict(zip(self.terms, map(float, found), strict=True))

    def _values(self, weights: Mapping[Term, float]) -> Array:
        return np.array([weights.get(term, 0.0) for term in self.terms])

    def norm(self, weights: Mapping[Term, float]) -> float:
        """Return the norm of a sum."""
        values = self._values(weights)
        return math.sqrt(max(0.0, float(values @ self.gram @ values)))

    def residual(self, weights: Mapping[Term, float]) -> float:
        """Return the norm of the difference from a sum, as a share of the fitted adapter's."""
        values = self._values(weights)
        square = self.square - 2 * float(values @ self.inner) + float(values @ self.gram @ values)
        return math.sqrt(max(0.0, square) / self.square)

    def cosine(self, weights: Mapping[Term, float]) -> float:
        """Return the cosine between the fitted adapter and a sum."""
        norm = self.norm(weights) * math.sqrt(self.square)
        return float(self._values(weights) @ self.inner) / norm if norm else 0.0

    def share(self, term: Term, weight: float) -> float:
        """Return the norm of a weighted term, as a share of the fitted adapter's."""
        index = self.terms.index(term)
        return abs(weight) * math.sqrt(float(self.gram[index, index]) / self.square)


@dataclass(frozen=True)
class LayerProducts:
    """The inner products of the changes of one layer, for k adapters.

    Attributes:
        ranks: The rank of each adapter in this layer, `(k,)`; 0 if it does not change the layer.
        finite: Whether its numbers are finite, and not so large that products overflow, `(k,)`; else they are left out.
        products: `[i, j, k, l]`: the inner product of √(sᵢsⱼ) Bᵢ Aⱼ and √(sₖsₗ) Bₖ Aₗ.
        in_columns: `[t, i, j]`: the inner product of changes i and j within the columns of B of adapter t.
        in_rows: `[t, i, j]`: the same within the rows of A of adapter t.
        equal: `[i, j]`: whether A and B of adapters i and j are the same.
        orthonormal: Whether the rows of A are orthonormal, as a singular value decomposition makes them, `(k,)`.
    """

    ranks: npt.NDArray[np.int64]
    finite: npt.NDArray[np.bool_]
    products: Array
    in_columns: Array
    in_rows: Array
    equal: npt.NDArray[np.bool_]
    orthonormal: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, deltas: Sequence[LoraDelta | None]) -> LayerProducts:
        """Return the products of one layer.

        Args:
            deltas: The change of each adapter; None if it has none. One of another shape than the first counts as none.

        Raises:
            InputError: If the ranks are too large together.
        """
        shape = next(delta.shape for delta in deltas if delta is not None)
        fitting = [delta if delta is not None and delta.shape == shape else None for delta in deltas]
        ranks = np.array([delta.rank if delta else 0 for delta in fitting])
        count, rank = len(fitting), int(ranks.max())
        if count * rank > MOST_RANKS:
            found = f"{count} adapters with ranks of up to {rank}"
            raise InputError(found, expected=f"{MOST_RANKS} ranks together")
        # factors of a lower rank are filled up with zeros
        a, b, scales = np.zeros((count, rank, shape[1])), np.zeros((count, rank, shape[0])), np.zeros(count)
        finite = np.ones(count, dtype=bool)
        for index, delta in enumerate(fitting):
            if delta is not None:
                rows, columns = delta.factors()
                # NaN is not below the limit either
                finite[index] = all(bool((np.abs(factor) < _LARGEST).all()) for factor in (rows, columns))
                if finite[index]:
                    a[index, : delta.rank], b[index, : delta.rank], scales[index] = rows, columns.T, delta.scaling
        of_a, of_b = _inner_products(a), _inner_products(b)
        # <Bᵢ Aⱼ, Bₖ Aₗ> = Σ (BᵢᵀBₖ) ∘ (AⱼAₗᵀ)
        pairs = of_b.reshape(count**2, -1) @ of_a.reshape(count**2, -1).T
        sizes = np.sqrt(np.multiply.outer(scales, scales))
        own = np.eye(rank) * (np.arange(rank) < ranks[:, None])[:, :, None]
        return cls(
            ranks,
            finite,
            pairs.reshape((count,) * 4).transpose(0, 2, 1, 3) * np.multiply.outer(sizes, sizes),
            _within(of_b, of_a, scales),
            _within(of_a, of_b, scales),
            _are_equal(of_a) & _are_equal(of_b),
            (ranks > 0) & (np.abs(np.einsum("iipq->ipq", of_a) - own).max(axis=(1, 2)) < 2.0**-6),
        )

    def system(self, kind: Kind, target: int, terms: Sequence[Term]) -> System:
        """Return the equations of the fit of one adapter.

        Args:
            kind: The kind of the sum.
            target: The position of the adapter.
            terms: The terms of the sum; those that this layer does not have are left out.
        """
        chosen = [
            (left, right)
            for left, right in terms
            if 0 < self.ranks[left] == self.ranks[right] and self.products[left, right, left, right] > 0
        ]
        b, a = (np.array([term[side] for term in chosen], dtype=int) for side in (0, 1))
        if kind == "cut":
            gram = self.in_columns[target][b[:, None], b[None]]
        else:
            gram = self.products[b[:, None], a[:, None], b[None], a[None]]
        return System(tuple(chosen), gram, self.products[b, a, target, target], self.square(target))

    def square(self, index: int) -> float:
        """Return the squared norm of an adapter's change."""
        return float(self.products[index, index, index, index])


def _inner_products(factors: Array) -> Array:
    """Return `[i, j, p, q]`: row p of matrix i times row q of matrix j, for matrices `(k, r, n)`."""
    count, rank, _ = factors.shape
    flat = factors.reshape(count * rank, -1)
    return np.ascontiguousarray((flat @ flat.T).reshape(count, rank, count, rank).transpose(0, 2, 1, 3))


def _within(inner: Array, outer: Array, scales: Array) -> Array:
    """Return `[t, i, j]`: the inner product of changes i and j in the space of one factor of adapter t.

    Args:
        inner: The inner products of that factor, `(k, k, r, r)`.
        outer: Those of the other factor.
        scales: The scale of each adapter, `(k,)`.
    """
    found = []
    for target in range(len(scales)):
        # the projection P on the span of the factor F of t: Fᵢᵀ P Fⱼ = (FᵢᵀFₜ) (FₜᵀFₜ)⁺ (FₜᵀFⱼ)
        inverse = np.linalg.pinv(inner[target, target], rcond=_LEAST_SINGULAR, hermitian=True)
        projected = np.einsum("ipq,jqs->ijps", inner[:, target] @ inverse, inner[target])
        found.append(np.einsum("ijps,ijps->ij", projected, outer) * np.multiply.outer(scales, scales))
    return np.array(found)


def _are_equal(inner: Array) -> npt.NDArray[np.bool_]:
    """Return `[i, j]`: whether matrices i and j are the same, by their inner products `(k, k, r, r)`."""
    crossed = np.einsum("ijpp->ij", inner)
    squares = np.add.outer(np.diag(crossed), np.diag(crossed))
    equal: npt.NDArray[np.bool_] = squares - 2 * crossed <= _SAME * squares
    return equal


Cause = Literal["left out", "of no source", "weights", "another layer", "another change", "trained on"]


@dataclass(frozen=True)
class LayerDeviation:
    """A layer that is not the sum of the others.

    Attributes:
        layer: The tensor that it changes.
        cause: `left out`: the sources change it, and the adapter does not; `of no source`: the reverse; `weights`: it
            is a sum with other weights; `another layer`: A or B is that of another layer; `another change`: any other;
            `trained on`: another change, not far from the sum.
        weights: The weights in this layer; empty if the sources do not explain it.
        homes: The layers whose A and whose B it has; empty for its own layer.
        cosine: Cosine between the change and the sum.
    """

    layer: str
    cause: Cause
    weights: Mapping[Term, float]
    homes: tuple[str, str] = ("", "")
    cosine: float = 0.0


@dataclass(frozen=True)
class Combination:
    """An adapter that is a sum of others.

    Attributes:
        members: All adapters that were compared.
        target: Its position among them.
        kind: The kind of the sum.
        weights: The weight of each term.
        lost: Norm of the difference from Σ wᵢ Dᵢ, as a share of this sum's norm; 0.0 for a plain sum.
        has_same_tensors: Whether A and B are those of its only source.
        is_decomposed: Whether the rows of A are orthonormal in each layer.
        scale_of_sources: The scale of the sources if it is the same in all layers; else None.
        deviations: The layers that are not this sum.
    """

    members: Sequence[Member]
    target: int
    kind: Kind
    weights: Mapping[Term, float]
    lost: float
    has_same_tensors: bool
    is_decomposed: bool
    scale_of_sources: float | None
    deviations: tuple[LayerDeviation, ...]

    @property
    def sources(self) -> list[Member]:
        """The adapters of the sum."""
        return [self.members[index] for index in sorted({index for term in self.weights for index in term})]


class Comparison:
    """The comparison of adapters with each other.

    Attributes:
        members: The adapters.
        layers: The inner products of each layer, by the tensor that it changes.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        """Read every factor once.

        Raises:
            InputError: If a file cannot be read, or the ranks are too large together.
        """
        self.members: Sequence[Member] = members
        names = dict.fromkeys(layer for member in members for layer in member.deltas)
        self.layers: dict[str, LayerProducts] = {
            layer: LayerProducts.of([member.deltas.get(layer) for member in members]) for layer in names
        }

    def combinations(self) -> dict[int, Combination]:
        """Return the adapters that are sums of others, by their positions.

        If C is A + B, A is C - B as well. Only the most likely one counts as the sum: one with a configuration as PEFT
        writes it, of a higher rank, or named later.
        """
        finite = np.all([products.finite for products in self.layers.values()], axis=0)
        order = sorted(
            (index for index in range(len(self.members)) if finite[index]),
            key=lambda index: (self.members[index].is_like_combined, self.members[index].rank, index),
        )
        independent, found = list[int](), dict[int, Combination]()
        for index in order:
            combination = self._combination(index, independent)
            if combination is None:
                independent.append(index)
            else:
                found[index] = combination
        return found

    def _combination(self, target: int, sources: Sequence[int]) -> Combination | None:
        if not sources:
            return None
        kinds: tuple[Kind, ...] = ("sum", "cut", "crossed")
        for kind in kinds:
            weights = self._common_weights(kind, target, sources)
            if weights:
                return self._described(kind, target, weights)
        return None

    def _layers_of(self, target: int) -> list[str]:
        return [layer for layer, products in self.layers.items() if products.square(target) > 0]

    def _common_weights(self, kind: Kind, target: int, sources: Sequence[int]) -> dict[Term, float]:
        """Return the weights that explain at least half of the layers; empty if no weights do."""
        terms = [(index, index) for index in sources]
        if kind == "crossed":
            if not 1 < len(sources) <= _MOST_CROSSED:
                return {}
            terms = [(left, right) for left in sources for right in sources]
        layers, exact = self._layers_of(target), []
        for layer in layers:
            system = self.layers[layer].system(kind, target, terms)
            weights = system.solved() if system.terms else {}
            if weights and self._holds(kind, target, layer, weights):
                exact.append((system, weights))
        if not layers or 2 * len(exact) < len(layers):
            return {}
        common = {}
        for term in terms:
            with_term = [(system, weights[term]) for system, weights in exact if term in weights]
            if not with_term:
                continue
            weight = float(np.median([weight for _, weight in with_term]))
            share = float(np.median([system.share(term, weight) for system, weight in with_term]))
            if share > self._tolerance(target, terms, 1.0):
                common[term] = weight
        holding = [layer for layer in layers if common and self._holds(kind, target, layer, common)]
        return common if 2 * len(holding) >= len(layers) else {}

    def _tolerance(self, target: int, terms: Sequence[Term], size: float) -> float:
        """Return the largest residual that rounding explains, as a share of the fitted change.

        Args:
            target: The fitted adapter.
            terms: The terms of the sum.
            size: Norms of all weighted terms together, as a share of the fitted change.
        """
        used = {target, *(index for term in terms for index in term)}
        return _FLOOR + _ROUNDINGS * max(self.members[index].roundoff for index in used) * (1 + size)

    def _holds(self, kind: Kind, target: int, layer: str, weights: Mapping[Term, float]) -> bool:
        products = self.layers[layer]
        system = products.system(kind, target, list(weights))
        size = sum(system.share(term, weights[term]) for term in system.terms)
        tolerance = self._tolerance(target, list(weights), size)
        if system.residual(weights) > tolerance:
            return False
        if kind != "cut":
            return True
        # the part of highest singular values is what is left in its columns, and in its rows
        at = np.array([left for left, _ in system.terms], dtype=int)
        rows = System(system.terms, products.in_rows[target][at[:, None], at[None]], system.inner, system.square)
        return rows.residual(weights) <= tolerance

    def _described(self, kind: Kind, target: int, weights: Mapping[Term, float]) -> Combination:
        used = sorted({index for term in weights for index in term})
        plain = {term: weight for term, weight in weights.items() if term[0] == term[1]}
        difference, whole, holding, deviations = 0.0, 0.0, list[str](), list[LayerDeviation]()
        for layer, products in self.layers.items():
            if products.square(target) > 0 and self._holds(kind, target, layer, weights):
                holding.append(layer)
                system = products.system("sum", target, list(plain))
                difference += system.residual(plain) ** 2 * system.square
                whole += system.norm(plain) ** 2
            else:
                deviation = self._deviation(kind, target, layer, weights, seek=len(deviations) < _MOST_SOUGHT)
                deviations += [deviation] if deviation else []
        scales = {
            self.members[index].deltas[layer].scaling
            for layer in holding
            for index in used
            if layer in self.members[index].deltas
        }
        return Combination(
            members=self.members,
            target=target,
            kind=kind,
            weights=weights,
            lost=math.sqrt(difference / whole) if kind != "sum" and whole else 0.0,
            has_same_tensors=len(used) == 1 and all(self.layers[layer].equal[target, used[0]] for layer in holding),
            is_decomposed=all(self.layers[layer].orthonormal[target] for layer in holding),
            scale_of_sources=scales.pop() if len(scales) == 1 else None,
            deviations=tuple(deviations),
        )

    def _deviation(
        self, kind: Kind, target: int, layer: str, weights: Mapping[Term, float], *, seek: bool
    ) -> LayerDeviation | None:
        """Return how a layer differs from the sum of the other layers; None if neither side changes it."""
        products = self.layers[layer]
        system = products.system(kind, target, list(weights))
        if products.square(target) == 0:
            return LayerDeviation(layer, "left out", {}) if system.terms else None
        if not system.terms:
            return LayerDeviation(layer, "of no source", {})
        solved = system.solved()
        if self._holds(kind, target, layer, solved):
            return LayerDeviation(layer, "weights", solved)
        homes = self._homes(target, sorted({index for term in weights for index in term}), layer) if seek else ("", "")
        if any(homes):
            return LayerDeviation(layer, "another layer", {}, homes)
        cosine = system.cosine(weights)
        return LayerDeviation(layer, "trained on" if cosine > _TRAINED_ON else "another change", {}, cosine=cosine)

    def _homes(self, target: int, sources: Sequence[int], layer: str) -> tuple[str, str]:
        """Return the other layers of the sources whose A and whose B a layer has; empty for its own, or for none."""
        used = [self.members[index] for index in (target, *sources)]
        tolerance = _FLOOR + _ROUNDINGS * max(member.roundoff for member in used)
        delta = self.members[target].deltas[layer]
        others = [
            name
            for name in self.layers
            if name != layer
            and all(name in member.deltas and member.deltas[name].shape == delta.shape for member in used)
        ]
        homes = []
        for factor, rows in enumerate(_rows_of(delta)):
            homes.append("")
            for name in (layer, *others):
                span = np.concatenate(
                    [_rows_of(member.deltas[name])[factor] for member in used[1:] if name in member.deltas]
                )
                if _outside(rows, span) <= tolerance:
                    homes[-1] = "" if name == layer else name
                    break
        return homes[0], homes[1]


def _rows_of(delta: LoraDelta) -> tuple[Array, Array]:
    """Return A, `(rank, inputs)`, and B transposed, `(rank, outputs)`."""
    a, b = delta.factors()
    return a, b.T


def _outside(rows: Array, span: Array) -> float:
    """Return the share of rows, by norm, that is not in the span of others."""
    inner = rows @ span.T
    inside = np.linalg.lstsq(span @ span.T, inner.T, rcond=_LEAST_SINGULAR)[0]
    square = float(np.sum(rows * rows))
    return math.sqrt(max(0.0, square - float(np.sum(inside * inner.T))) / square) if square else 0.0
