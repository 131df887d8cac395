"""The adapter at hand: whether a merged model's difference from the base is the adapter's own product.

It is compared with the sum in float64, by the names of the adapter's tensors and not by the merging code: each number
within what rounding explains, in whichever order the merge rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pytest_mistral_lora.checkpoint.architectures import EMBEDDINGS, is_known
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.conformance.adapter.configuration import configuration_findings
from pytest_mistral_lora.conformance.adapter.layout import AdapterLayout, adapter_layout
from pytest_mistral_lora.conformance.finding import Finding, first_findings
from pytest_mistral_lora.conformance.merged.weights import rounding_bound, row_blocks
from pytest_mistral_lora.errors import InputError, MistralLoraError, and_more
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_config import CONFIG, require_plain_sum
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.lora_delta import LoraDelta, deltas_of

Array: TypeAlias = npt.NDArray[Any]

_CHUNK = 1 << 22
"""Numbers to compare at a time."""

_SHOWN = 5
_ALIKE = 0.7
"""Least cosine between a change and a product: rounding hides a part of a small change."""


class AdapterAtHand:
    """An adapter that may have been merged into a base, and the merged weights.

    Attributes:
        folder: The adapter's folder.
        base: The base.
        own: The merged tensors.
        before: The base's tensors.
        pairs: The name of each merged tensor in the base, if it has one.
    """

    def __init__(
        self, folder: AdapterFolder, base: BaseFolder, merged: Weights, before: Weights, pairs: Mapping[str, str]
    ) -> None:
        self.folder: AdapterFolder = folder
        self.base: BaseFolder = base
        self.own: Weights = merged
        self.before: Weights = before
        self.pairs: dict[str, str] = {name: merged_name for merged_name, name in pairs.items()}

    @cached_property
    def _plan(self) -> tuple[Mapping[str, LoraDelta], str]:
        """The delta of each tensor of the base, or why there is no plan."""
        try:
            # before PEFT reads the file: a hostile key or pattern must not reach it
            wrong = next(configuration_findings(self.folder), None)
            if wrong is not None:
                return {}, f"the configuration of {self.folder.path} is not sound: {wrong.found}"
            if is_known(self.base.config):
                layout = adapter_layout(self.folder, self.base)
                if layout.refusal:
                    return {}, f"PEFT refuses the configuration of {self.folder.path}: {layout.refusal}"
                self._require_sum()
                _require_tensors(self.folder, layout)
            else:
                self._require_sum()
            return self._fitting_deltas(), ""
        except MistralLoraError as error:
            return {}, f"{self.folder.path} has no sum with this base: {error}"

    def _require_sum(self) -> None:
        config = self.folder.config
        bias = "none" if config.get("bias") is None else config["bias"]
        require_plain_sum(bias, config.get("init_lora_weights"), Place.of(self.folder.config_file))

    def _fitting_deltas(self) -> dict[str, LoraDelta]:
        """Return the delta of each tensor that changes, by its name in the base.

        Raises:
            InputError: If a delta has no place in the base, or changes one of two tensors that the base ties.
        """
        deltas, place = deltas_of(self.folder, self.before), Place.of(self.folder.tensors_file)
        ties = is_known(self.base.config) and self.base.is_tied
        for name, delta in deltas.items():
            shared = [part for part in EMBEDDINGS if f".{name}".endswith(f".{part}.weight")]
            if shared and ties:
                raise InputError(
                    f"{delta.names[0]} changes {shared[0]}, which this base keeps as one with the other of "
                    f"{' and '.join(EMBEDDINGS)}",
                    place=place,
                    expected="an adapter that changes neither: merged, they would be two",
                    next_step="Use base and adapter as they are, or untie the base's embeddings and train on that.",
                )
            if name not in self.before or delta.shape != self.before.infos[name].shape:
                raise InputError(f"{delta.names[0]} has no place in the base", place=place)
        return deltas

    @property
    def missing(self) -> str:
        """Why the product is not compared; empty if it is compared."""
        return self._plan[1]

    @property
    def planned(self) -> dict[str, bool]:
        """The merged tensors that the adapter changes, and whether each is a change of low rank."""
        return {self.pairs.get(name, name): delta.is_low_rank for name, delta in self._plan[0].items()}

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """ML434 for each tensor that is not base plus adapter, up to rounding."""
        place, found = Place.of(self.own.files[0].parent), list[Finding]()
        for name, delta in sorted(self._plan[0].items()):
            merged_name = self.pairs.get(name)
            if merged_name is None:
                continue  # of another shape or missing: a finding of the check `names-and-shapes`
            apart = self._distance(merged_name, name, delta)
            if apart > 2:
                text = self._described(merged_name, name, delta)
                expected = f"base plus scaling · B A of {self.folder.path}: {apart:.3g} times what rounding explains"
                found.append(Finding("ML434", f"{merged_name}: {text}", place, expected))
        return tuple(first_findings(found, _SHOWN, place))

    def _distance(self, merged_name: str, name: str, delta: LoraDelta) -> float:
        """Return the largest distance of a number from base plus adapter, in units of the rounding bound."""
        merged, base = (_rows_of(array) for array in (self.own.array(merged_name), self.before.array(name)))
        factors = tuple(np.abs(factor).astype(np.float32) for factor in delta.factors()) if delta.is_low_rank else None
        farthest = 0.0
        for rows in row_blocks(len(base), base.shape[1], _CHUNK):
            old, new = base[rows].astype(np.float32), merged[rows].astype(np.float32)
            with np.errstate(all="ignore"):  # numbers that are not finite, or rows of zeros under DoRA
                expected = delta.sums(base, rows)[0].astype(np.float32)
                bound = rounding_bound(new, old, expected - old, self.own.infos[merged_name].dtype)
                if factors is None:
                    bound = bound + np.abs(expected) * np.float32(2**-8)
                else:
                    # A and B may have been rounded to bfloat16 first
                    product = (factors[1][rows] @ factors[0]) * np.float32(abs(delta.scaling) * 2**-7)
                    # DoRA divides by the norm of the sum, which is rounded as well
                    extra = np.abs(expected) * np.float32(2**-7) if delta.has_magnitude else np.float32(0)
                    bound = bound + product + extra
                apart = np.abs(new - expected) / np.maximum(bound, np.finfo(np.float32).tiny)
            farthest = max(farthest, math.inf if np.isnan(apart).any() else float(apart.max()))
        return farthest

    def _described(self, merged_name: str, name: str, delta: LoraDelta) -> str:
        """Describe the difference: nothing merged, another scale, the product of another layer, or another change."""
        difference = self.own.array(merged_name).astype(np.float32) - self.before.array(name).astype(np.float32)
        if not difference.any():
            return "is the base's: the adapter's change is missing"
        if not delta.is_low_rank or delta.has_magnitude:
            return "is not the adapter's tensor"
        factor, cosine = _fit(difference, delta)
        if cosine > _ALIKE:
            root = math.isclose(max(factor, 1 / factor), math.sqrt(delta.rank), rel_tol=0.05)
            hint = f" ({'' if factor > 1 else '1 / '}√r: see use_rslora)" if root else ""
            return f"the adapter is merged {factor:.3f} times{hint}"
        for other, another in sorted(self._plan[0].items()):
            if other != name and another.is_low_rank and _fit(difference, another)[1] > _ALIKE:
                return f"has the change of {other}"
        return f"the change is another than the adapter's (cosine {cosine:.2f})"


def _require_tensors(folder: AdapterFolder, layout: AdapterLayout) -> None:
    """Refuse an adapter whose tensors differ from those that PEFT saves for its configuration on this base.

    Raises:
        InputError: If a tensor is missing, has no place, or has another shape.
    """
    place, tensors, expected = Place.of(folder.tensors_file), folder.tensors, layout.expected
    odd = sorted(expected.keys() ^ tensors.keys())
    if odd:
        found = f"{odd[0]} {'is missing' if odd[0] in expected else 'has no place in a merged model'}"
        names = f"the {len(expected)} tensors that {CONFIG} describes"
        raise InputError(found + and_more(1, len(odd)), place=place, expected=names)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            wanted = f"{shape}, of this base and the rank in {CONFIG}"
            raise InputError(f"{name} has shape {tensors[name].shape}", place=place, expected=wanted)


def _rows_of(array: Array) -> Array:
    """Return a tensor as a matrix with its first axis as rows."""
    return array.reshape(len(array), -1)


def _fit(difference: Array, delta: LoraDelta) -> tuple[float, float]:
    """Return the factor of the adapter's product that fits a difference best, and the cosine between the two."""
    if difference.shape != delta.shape:
        return 0.0, 0.0
    a, b = delta.factors()
    # <D, s B A> = s tr((Bᵀ D) Aᵀ), and ||B A||² = tr((Bᵀ B)(A Aᵀ)): B A itself is never made
    inner = delta.scaling * float(np.sum((b.T @ difference) * a))
    square = delta.scaling**2 * float(np.sum((b.T @ b) * (a @ a.T)))
    if square <= 0:
        return 0.0, 0.0
    return inner / square, inner / math.sqrt(square) / float(np.linalg.norm(difference))
