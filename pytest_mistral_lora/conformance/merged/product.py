"""The adapter at hand beside a merged model: is the difference from the base the adapter's own product?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from pytest_mistral_lora.checkpoint.architectures import is_known
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.conformance.adapter.configuration import configuration_findings
from pytest_mistral_lora.conformance.adapter.layout import adapter_layout
from pytest_mistral_lora.conformance.finding import Finding, first_findings
from pytest_mistral_lora.conformance.merged.weights import rounding_bound
from pytest_mistral_lora.errors import InputError, MistralLoraError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.merged_weights import changes_by_names

if TYPE_CHECKING:
    import torch

    from pytest_mistral_lora.training.merge.plan import LowRankChange, TensorChange

_CHUNK = 1 << 22
"""Numbers that are compared at once."""

_SHOWN = 5
_A = ".lora_A.weight"
_ALIKE = 0.7
"""Cosine from which a change is taken for a product: rounding hides a part of a small one."""


class AdapterAtHand:
    """An adapter that may have been merged into a base, and the merged weights.

    Attributes:
        folder: The adapter's folder.
        base: The base.
        own: The merged tensors.
        before: The base's tensors.
        pairs: The name in the base of each merged tensor that has one there.
    """

    def __init__(
        self, folder: AdapterFolder, base: BaseFolder, own: Weights, before: Weights, pairs: Mapping[str, str]
    ) -> None:  # fmt: skip
        self.folder: AdapterFolder = folder
        self.base: BaseFolder = base
        self.own: Weights = own
        self.before: Weights = before
        self.pairs: dict[str, str] = {name: mine for mine, name in pairs.items()}

    @cached_property
    def _plan(self) -> tuple[Mapping[str, TensorChange], str]:
        """The change of each tensor of the base by PEFT's own rules, or why there is no plan."""
        from pytest_mistral_lora.training.merge.plan import plan_merge

        try:
            # before PEFT reads the file: a hostile key or pattern must not reach it
            wrong = next(configuration_findings(self.folder), None)
            if wrong is not None:
                return {}, f"the configuration of {self.folder.path} is not sound: {wrong.found}"
            if not is_known(self.base.config):
                return plan_by_names(self.folder, self.before), ""
            if refusal := adapter_layout(self.folder, self.base).refusal:
                return {}, f"PEFT refuses the configuration of {self.folder.path}: {refusal}"
            return plan_merge(self.folder, self.base), ""
        except MistralLoraError as error:
            return {}, f"{self.folder.path} has no sum with this base: {error}"

    @cached_property
    def _tensors(self) -> Weights:
        return self.folder.weights

    @property
    def missing(self) -> str:
        """Why the product is not compared; empty if it is."""
        return self._plan[1]

    @property
    def planned(self) -> dict[str, bool]:
        """The merged tensors that the adapter changes, and whether each is a change of low rank."""
        from pytest_mistral_lora.training.merge.plan import LowRankChange

        return {self.pairs.get(name, name): isinstance(one, LowRankChange) for name, one in self._plan[0].items()}

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """ML434 for each tensor that is not base plus adapter, up to rounding."""
        place, found = str(self.own.files[0].parent), []
        for name, change in sorted(self._plan[0].items()):
            mine = self.pairs.get(name)
            if mine is None:
                continue  # of another shape or missing: a finding of the check `names-and-shapes`
            apart = self._distance(mine, name, change)
            if apart > 2:
                text = self._described(mine, name, change)
                expected = f"base plus scaling · B A of {self.folder.path}: {apart:.3g} times what rounding explains"
                found.append(Finding("ML434", f"{mine}: {text}", place, expected))
        return tuple(first_findings(found, _SHOWN, place))

    def _distance(self, mine: str, name: str, change: TensorChange) -> float:
        """Return the largest distance of a number from base plus adapter, in units of what rounding explains."""
        import torch

        from pytest_mistral_lora.training.merge.plan import LowRankChange

        own, base = self.own[mine], self.before[name]
        tensors = {one: self._tensors[one] for one in change.names}
        rows, farthest = max(1, _CHUNK // max(1, base[0].numel())), 0.0
        for start in range(0, base.shape[0], rows):
            part = slice(start, start + rows)
            old, new = base[part].float(), own[part].float()
            expected = change.apply(base, tensors, part).float()
            apart_by = (expected - old).numpy()
            bound = torch.from_numpy(rounding_bound(new.numpy(), old.numpy(), apart_by, self.own.infos[mine].dtype))
            if isinstance(change, LowRankChange):
                # A and B may have been rounded to bfloat16 first
                a, b = tensors[change.a].float().abs(), tensors[change.b][part].float().abs()
                product = (b @ a) * (abs(change.scaling) * 2**-7)
                # DoRA divides by the norm of the sum, which is rounded as well
                bound += product if change.magnitude is None else product + expected.abs() * 2**-7
            else:
                bound += expected.abs() * 2**-8
            apart = (new - expected).abs() / bound.clamp(min=torch.finfo(torch.float32).tiny)
            farthest = max(farthest, math.inf if torch.isnan(apart).any() else float(apart.max()))
        return farthest

    def _described(self, mine: str, name: str, change: TensorChange) -> str:
        """Describe the difference: nothing merged, another scale, the product of another layer, or something else."""
        from pytest_mistral_lora.training.merge.plan import LowRankChange

        difference = self.own[mine].float() - self.before[name].float()
        if not difference.any():
            return "is the base's: the adapter's change is missing"
        if not isinstance(change, LowRankChange) or change.magnitude is not None:
            return "is not the adapter's tensor"
        factor, cosine = self._fit(difference, change)
        if cosine > _ALIKE:
            rank = self._tensors.infos[change.a].shape[0]
            root = math.isclose(max(factor, 1 / factor), math.sqrt(rank), rel_tol=0.05)
            hint = f" ({'' if factor > 1 else '1 / '}√r: see use_rslora)" if root else ""
            return f"the adapter is merged {factor:.3f} times{hint}"
        for other, one in sorted(self._plan[0].items()):
            if other != name and isinstance(one, LowRankChange) and self._fit(difference, one)[1] > _ALIKE:
                return f"has the change of {other}"
        return f"the change is another than the adapter's (cosine {cosine:.2f})"

    def _fit(self, difference: torch.Tensor, change: LowRankChange) -> tuple[float, float]:
        """Return the factor of the adapter's product that fits a difference best, and the cosine between the two."""
        import torch

        a, b = self._tensors[change.a].float(), self._tensors[change.b].float()
        if tuple(difference.shape) != (b.shape[0], a.shape[1]):
            return 0.0, 0.0
        # <D, s B A> = s tr((Bᵀ D) Aᵀ), and ||B A||² = tr((Bᵀ B)(A Aᵀ)): B A itself is never made
        inner = change.scaling * float(torch.sum((b.T @ difference) * a))
        square = change.scaling**2 * float(torch.sum((b.T @ b) * (a @ a.T)))
        if square <= 0:
            return 0.0, 0.0
        return inner / square, inner / math.sqrt(square) / float(torch.linalg.norm(difference))


def plan_by_names(folder: AdapterFolder, base: Weights) -> dict[str, TensorChange]:
    """Return the change of each tensor of a base that is not built here, by the names of the adapter's tensors.

    Raises:
        InputError: If a tensor has no place in the base, a pattern of the configuration takes too long, or the adapter
            was trained on another base than the one it names.
    """
    from pytest_mistral_lora.training.merge.plan import FullChange, LowRankChange

    start = folder.config.get("init_lora_weights")
    if start not in (True, False, None, "gaussian"):
        raise InputError(f"init_lora_weights is {start!r}, which changed the base first", place=str(folder.config_file))
    adapter, changes = folder.weights, dict[str, TensorChange]()
    for name, one in changes_by_names(folder, base).items():
        parts = one.names
        changes[name] = change = (
            FullChange(parts[""])
            if "" in parts
            else LowRankChange(parts["A.weight"], parts["B.weight"], one.scaling, parts.get("magnitude_vector"))
        )
        if name not in base or change.shape(adapter) != base.infos[name].shape:
            raise InputError(f"{change.names[0]} has no place in the base", place=str(folder.tensors_file))
    return changes
