"""Merged weights compared with the base's, tensor by tensor: the changes, their sizes and their ranks."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.conformance.finding import Finding, first_findings
from pytest_mistral_lora.errors import and_more
from pytest_mistral_lora.places import Place

Array: TypeAlias = npt.NDArray[Any]

LARGEST_CHANGE = 3.0
"""A trained adapter changes a matrix by a few hundredths of its norm; in a tiny random model, by about one."""

_SCALED = 0.01  # of a matrix's norm: more than rounding to bfloat16 twice changes
_BLOCK = 1024
"""Rows and columns used to estimate the rank."""

_SCALED_BLOCK = 256
_TURNS = 30

_SMALLEST = 16
"""Matrices with fewer rows or columns are too small to tell low rank from full rank."""

_CHUNK = 1 << 23
"""Numbers to compare at a time."""

_MANTISSA = {"BF16": 7, "F16": 10, "F32": 23}
_SHOWN = 5
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)\.weight$")
_SHARED = re.compile(r"(?:^|\.)(embed_tokens|lm_head|tok_embeddings|output)\.weight$")


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A merged tensor, compared with the base's of the same name.

    Attributes:
        finite: Whether every number is finite.
        unchanged: Whether it equals the base's, up to the rounding of a dtype.
        relative: Norm of the change, divided by the norm of the base's tensor.
        rank: The lowest rank that explains the change, up to rounding; None if it was not estimated.
        smaller: The smaller of the numbers of rows and columns used for the estimate.
        changed_rows: Number of rows that differ from the base's.
        rows: Number of rows.
        emptied: Number of rows and columns that are zero, and not in the base.
    """

    finite: bool
    unchanged: bool = True
    relative: float = 0.0
    rank: int | None = None
    smaller: int = 0
    changed_rows: int = 0
    rows: int = 0
    emptied: int = 0

    @property
    def is_low_rank(self) -> bool:
        """Whether a rank of at most half the possible one explains the change."""
        return self.rank is None or self.rank <= self.smaller // 2


def compare_tensors(merged: Weights, base: Weights, pairs: Mapping[str, str]) -> dict[str, MergedTensor]:
    """Compare every merged tensor with the base's, one pair at a time.

    Args:
        merged: The merged tensors.
        base: The base's.
        pairs: The name of each merged tensor in the base, if it has one.
    """
    found = {}
    # numbers may be not finite, or too large for a narrower dtype
    with np.errstate(all="ignore"), merged.held_open(), base.held_open():
        for name in merged:
            tensor = merged.array(name)
            if name in pairs and tensor.ndim and tensor.size:
                found[name] = _compare(tensor, base.array(pairs[name]), merged.infos[name].dtype)
            else:
                found[name] = MergedTensor(_is_finite(tensor))
    return found


def row_blocks(rows: int, width: int, numbers: int) -> Iterator[slice]:
    """Yield the rows of a matrix in parts, in order: memory is bounded by the numbers of a part.

    Args:
        rows: The number of rows.
        width: The numbers in a row.
        numbers: The most numbers in a part; a part has one row at least.
    """
    step = max(1, numbers // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))


def _is_finite(tensor: Array) -> bool:
    # in parts: the embeddings of a large model in float32 would be gigabytes
    flat = tensor.reshape(-1)
    parts = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    return all(bool(np.isfinite(part.astype(np.float32)).all()) for part in parts)


def _compare(merged: Array, base: Array, dtype: str) -> MergedTensor:
    # of a larger vocabulary, only the base's rows
    base = base[: merged.shape[0]]
    finite, changed, emptied, sums = _is_finite(merged), 0, 0, [0.0, 0.0]
    columns = np.zeros((2, merged[0].size), dtype=bool)  # not zero, in the merged tensor and in the base
    # a merge may have gone through a narrower dtype than the file's: bf16 weights that were saved as float32
    same = dict.fromkeys((merged.dtype, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)), True)
    for rows in row_blocks(base.shape[0], merged[0].size, _CHUNK):
        new, old = (array[rows].reshape(-1, array[0].size) for array in (merged[: base.shape[0]], base))
        for through in same:
            same[through] = same[through] and np.array_equal(old.astype(through).astype(merged.dtype), new)
        if not same[merged.dtype]:
            change = new.astype(np.float32) - old.astype(np.float32)
            changed += int((change != 0).any(axis=1).sum())
            emptied += int((old.any(axis=1) & ~new.any(axis=1)).sum())
            columns |= (new.any(axis=0), old.any(axis=0))
            sums[0] += _energy(change)
        sums[1] += _energy(old)
    unchanged = any(same.values())
    relative = 0.0
    if sums[1]:
        relative = math.sqrt(sums[0] / sums[1])
    elif sums[0]:
        relative = math.inf
    rank = smaller = None
    if finite and not unchanged and merged.ndim >= 2:
        # of stacked experts, the first: each has its own change
        matrices = [array if array.ndim == 2 else array.reshape(-1, *array.shape[-2:])[0] for array in (merged, base)]
        rank, smaller = _change_rank(matrices[0], matrices[1], dtype)
    emptied += int((columns[1] & ~columns[0]).sum()) if merged.ndim > 1 else 0
    return MergedTensor(finite, unchanged, relative, rank, smaller or 0, changed, base.shape[0], emptied)


def _energy(values: Array) -> float:
    """Return the sum of the squares, in float64."""
    wide = values.astype(np.float64).reshape(-1)
    return float(wide @ wide)


def _change_rank(merged: Array, base: Array, dtype: str) -> tuple[int | None, int]:
    """Return the lowest rank that explains the change up to rounding, and the smaller side of the examined part."""
    new, old = (_part(array[: base.shape[0]], _BLOCK) for array in (merged, base))
    smaller = min(new.shape)
    if smaller < _SMALLEST:
        return None, smaller
    # M = W + s B A + E, and |E| is below the bound of each entry. By Eckart and Young, the singular values of M - W
    # beyond the rank of B A have at most the energy of E: with more of it, no matrix of that rank explains the change.
    change = new - old
    if not np.isfinite(change).all():
        return None, smaller  # the base has a number that is not finite
    rank = _rank_above(change, rounding_bound(new, old, change, dtype))
    if rank <= smaller // 2:
        return rank, smaller
    scaled, side = _rank_of_scaled_rows(_part(new, _SCALED_BLOCK), _part(old, _SCALED_BLOCK), dtype)
    return (scaled, side) if scaled <= side // 2 else (rank, smaller)


def _part(matrix: Array, most: int) -> Array:
    """Return evenly spread rows and columns, in float32: a part of a matrix has at most the rank of the whole."""
    steps = [math.ceil(size / most) for size in matrix.shape]
    return matrix[:: steps[0], :: steps[1]].astype(np.float32)


def _rank_above(change: Array, bound: Array) -> int:
    energy = np.linalg.svd(change, compute_uv=False).astype(np.float64) ** 2
    tail = energy[::-1].cumsum()[::-1]  # tail[k]: the energy left by a change of rank k
    return int((tail > _energy(bound)).sum())


def _rank_of_scaled_rows(new: Array, old: Array, dtype: str) -> tuple[int, int]:
    """Return the same for a change that rescales rows, as DoRA does: M = diag(d) (W + s B A) + E."""
    smaller, product = min(new.shape), np.zeros_like(old)
    # by turns: the factors d of the rows for a given product, and the best product for given factors
    for _ in range(_TURNS):
        whole = old + product
        factors = (new * whole).sum(axis=1, keepdims=True)
        factors /= np.maximum((whole * whole).sum(axis=1, keepdims=True), np.float32(1e-30))
        factors[factors == 0] = 1
        left, values, right = np.linalg.svd(new / factors - old, full_matrices=False)
        values[smaller // 4 :] = 0
        product = (left * values) @ right
    # W + s B A is rounded before its rows are scaled, and after
    bound = 2 * rounding_bound(new, old, new - old, dtype)
    return _rank_above(new - factors * old, bound), smaller


def rounding_bound(new: Array, old: Array, change: Array, dtype: str) -> Array:
    """Return the largest rounding error of each number of a merge.

    Args:
        new: Merged weights in float32.
        old: The base's in float32.
        change: Their difference, or the expected change.
        dtype: dtype of the merged file, as safetensors writes it.
    """

    def fits(values: Array, narrow: Any) -> bool:
        return np.array_equal(values.astype(narrow).astype(np.float32), values)

    # the numbers decide: weights in float32 may have been merged in bfloat16
    narrow = {"BF16": ml_dtypes.bfloat16, "F16": np.float16}
    used = next((name for name, info in narrow.items() if fits(new, info)), dtype)
    # half a unit in the last place of the sum, and of the base if it was rounded first; B A may be rounded as well
    bound = _spacing(new, used) * np.float32(0.5) + np.abs(change) * np.float32(2**-7)
    if used in narrow and not fits(old, narrow[used]):
        bound += _spacing(old, used) * np.float32(0.5)
    return bound


def _spacing(values: Array, dtype: str) -> Array:
    """Return the distance from each number to the next in a dtype."""
    exponents = np.frexp(values)[1] - 1
    # float16 has no number between 0 and 2 ** -24; zero has no exponent
    exponents = np.maximum(np.where(values == 0, -126, exponents), -14 if dtype == "F16" else -126)
    spacing: Array = np.ldexp(np.ones_like(values), exponents - _MANTISSA.get(dtype, 23))
    return spacing


def place_findings(
    tensors: Mapping[str, MergedTensor], place: Place, planned: Mapping[str, bool] | None
) -> Iterator[Finding]:
    """Yield ML430 and ML439: changes outside of the layers that LoRA adapts.

    Args:
        tensors: The result of `compare_tensors`.
        place: The folder.
        planned: The tensors that the adapter at hand changes; None without an adapter.
    """
    findings, notes = [], []
    for name, tensor in sorted(tensors.items()):
        shared = _SHARED.search(name)
        if tensor.unchanged or not tensor.finite or (planned is not None and name in planned):
            continue
        if planned is None and not shared and tensor.rank is not None and LAYER.search(name):
            continue
        by = f"{name} changed by {tensor.relative:.3g} of its norm"
        # a low-rank change of every row is LoRA's; a change of some rows is not
        is_product = tensor.rank is not None and tensor.is_low_rank and (tensor.rank or tensor.relative <= _SCALED)
        if planned is None and shared and is_product and tensor.changed_rows == tensor.rows:
            found = f"{by}, with rank {tensor.rank}"
            expected = "the base's, unless LoRA was put on it: then name the adapter with --mistral-adapter, too"
            notes.append(Finding("ML439", found, place, expected))
            continue
        found = f"{by}, in {tensor.changed_rows} of {tensor.rows} rows" if shared else by
        expected = "the base's: the adapter does not change it"
        if planned is None:
            expected = "the base's; if modules_to_save trained it in full, name the adapter with --mistral-adapter, too"
        findings.append(Finding("ML430", found, place, expected))
    yield from first_findings(findings, _SHOWN, place)
    yield from first_findings(notes, _SHOWN, place)


def rank_findings(
    tensors: Mapping[str, MergedTensor], place: Place, planned: Mapping[str, bool] | None
) -> Iterator[Finding]:
    """Yield ML431 for each layer whose change does not have low rank, and ML433 for too large a change."""
    layers = {
        name: tensor
        for name, tensor in tensors.items()
        if LAYER.search(name) and tensor.finite and not tensor.unchanged
    }
    if planned is not None:
        layers = {name: tensor for name, tensor in layers.items() if planned.get(name)}
    highest = max(
        (tensor.rank for tensor in layers.values() if tensor.rank is not None and tensor.is_low_rank), default=0
    )
    ranks, sizes = [], []
    for name, tensor in sorted(layers.items()):
        # a matrix no larger than the others' rank can have any change
        if not tensor.is_low_rank and tensor.smaller >= 2 * highest:
            found = f"the change of {name} has rank {tensor.rank}, of {tensor.smaller} that are possible"
            expected = f"at most {tensor.smaller // 2}, up to rounding: the product of two narrow matrices"
            ranks.append(Finding("ML431", found, place, expected))
        if planned is None and tensor.rank == 0 and tensor.relative > _SCALED:
            ranks.append(Finding("ML431", f"the rows of {name} have other scales, and nothing else", place, "B A"))
        if tensor.emptied:
            found = f"{tensor.emptied} rows or columns of {name} are zero, and not in the base"
            ranks.append(Finding("ML431", found, place, "the base's numbers, changed: a shard may be lost"))
        if tensor.relative > LARGEST_CHANGE:
            found = f"{name} changed by {tensor.relative:.3g} times its norm"
            sizes.append(Finding("ML433", found, place, f"far below 1, and never above {LARGEST_CHANGE:g}"))
    yield from first_findings(ranks, _SHOWN, place)
    yield from first_findings(sizes, _SHOWN, place)


def layer_findings(
    tensors: Mapping[str, MergedTensor],
    folder: Path,
    *,
    files: Mapping[str, str] | None = None,
    declared: Sequence[str] = (),
) -> Iterator[Finding]:
    """Yield ML432 for each change that is provably lost, and ML438 for layers without any change.

    A change is lost if the manifest declares it; if most layers have it, and this layer has others; if the layers
    before and behind all have changes; and if a file has none, though it has a part of a layer that is changed.

    Args:
        tensors: The result of `compare_tensors`.
        folder: The folder of the merged model.
        files: The name of each tensor's file.
        declared: The modules that the manifest says the adapter changes; empty if it does not say it.
    """
    place = Place.of(folder)
    kinds: dict[str, dict[int, bool]] = defaultdict(dict)
    homes: dict[tuple[str, int], str] = {}
    for name, tensor in tensors.items():
        match = LAYER.search(name)
        if match and (tensor.rank is not None or tensor.unchanged):
            kinds[match[2]][int(match[1])] = not tensor.unchanged
            homes[match[2], int(match[1])] = (files or {}).get(name, "")
    if declared:
        yield from first_findings(list(_declared_findings(kinds, declared, place)), _SHOWN, place)
        return
    changed = {kind: layers for kind, layers in kinds.items() if any(layers.values())}
    touched = {layer for layers in changed.values() for layer, moved in layers.items() if moved}
    rest = sorted({layer for layers in changed.values() for layer in layers} - touched)
    stale = _stale_files(changed, homes, touched)
    findings = []
    for file, layers_of_file in sorted(stale.items()):
        shared = next((f"layer {layer}" for layer in layers_of_file if layer in touched), "each layer")
        found = f"every weight of {file} is the base's, and {shared} is changed in the other files"
        findings.append(Finding("ML432", found, Place.of(folder / file), "the file that the merge wrote"))
    for kind, layers in sorted(changed.items()):
        lost = [layer for layer, moved in sorted(layers.items()) if not moved and layer in touched]
        lost = [layer for layer in lost if homes[kind, layer] not in stale]
        if lost and 2 * sum(layers.values()) >= len(layers):
            found = f"{kind} is the base's in {_layers_text(lost)}, and is changed in the others"
            findings.append(Finding("ML432", found, place, "a change in each layer that was adapted"))
    rest = [layer for layer in rest if not any(layer in layers for layers in stale.values())]
    if len(rest) == 1 and min(touched) < rest[0] < max(touched):
        # layers_to_transform lists the first layers, the last ones, or each second one: not all but one
        found = f"nothing is changed in layer {rest[0]}, and each layer before and behind it is changed"
        expected = (
            "a change in each layer; if layers_to_transform leaves it out, name the adapter with --mistral-adapter"
        )
        findings.append(Finding("ML432", found, place, expected))
    elif rest:
        expected = "changes in every layer, unless layers_to_transform left some out"
        findings.append(Finding("ML438", f"nothing is changed in {_layers_text(rest)}", place, expected))
    yield from first_findings(findings, _SHOWN, place)


def _declared_findings(
    kinds: Mapping[str, Mapping[int, bool]], declared: Sequence[str], place: Place
) -> Iterator[Finding]:
    for module in declared:
        match = LAYER.search(f"{module}.weight")
        if match and kinds.get(match[2], {}).get(int(match[1])) is False:
            yield Finding("ML432", f"{module} is the base's", place, "a change: the manifest lists it in lora.modules")


def _stale_files(
    changed: Mapping[str, Mapping[int, bool]], homes: Mapping[tuple[str, int], str], touched: Set[int]
) -> dict[str, list[int]]:
    """Return the layers of each file that has no change and is provably not of the merge.

    One of its layers is changed in another file; or it is the only such file, and each layer of the others is changed.
    In files of one layer each, any choice of layers looks like that.
    """
    moved_files = {homes[kind, layer] for kind, layers in changed.items() for layer, moved in layers.items() if moved}
    found: dict[str, set[int]] = defaultdict(set)
    for kind, layers in changed.items():
        for layer in layers:
            if homes[kind, layer] not in moved_files:
                found[homes[kind, layer]].add(layer)
    layers_of_all = {layer for layers in changed.values() for layer in layers}
    is_alone = len(found) == 1 and len({*moved_files, *found}) < len(layers_of_all)
    return {
        file: sorted(layers)
        for file, layers in found.items()
        if layers & touched or (is_alone and layers_of_all - layers == touched)
    }


def _layers_text(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:_SHOWN]))
    return f"layer{'s' if len(layers) > 1 else ''} {shown}{and_more(_SHOWN, len(layers))}"
