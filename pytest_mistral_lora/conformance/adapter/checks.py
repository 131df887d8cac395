"""Subject `adapter`: is a folder a trained LoRA adapter that fits its configuration, and its base?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pytest_mistral_lora.conformance.adapter import base as adapter_base
from pytest_mistral_lora.conformance.adapter import base as adapter_effect
from pytest_mistral_lora.conformance.adapter import config as adapter_config
from pytest_mistral_lora.conformance.adapter import merged as adapter_values
from pytest_mistral_lora.conformance.adapter import names as adapter_names
from pytest_mistral_lora.conformance.adapter.files import Opened, model_files, open_adapter
from pytest_mistral_lora.conformance.adapter.merged import merged_cases
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import AdapterTarget
from pytest_mistral_lora.errors import InputError, PinError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder, LocatedBase
from pytest_mistral_lora.records.files import inside

Case = Callable[[], Result]
_UNREADABLE = "the files cannot be read: see the check `files`"


def checks(target: AdapterTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of an adapter folder, or of a merged model's."""
    for case, judge in cases(target.folder, target.base).items():
        yield Check(target, "adapter", case, judge)


def cases(folder: Path, base: Path | None) -> Mapping[str, Case]:
    """Return what is checked of a folder, by name.

    Args:
        folder: The folder.
        base: The base checkpoint, where the user named it.
    """
    manifest = adapter_base.valid_manifest(folder)
    if manifest is not None and manifest["kind"] == "merged" and model_files(folder):
        return merged_cases(folder, base)
    judged = Judged(folder, base)
    return {
        "files": judged.files,
        "tensors-complete": judged.tensors_complete,
        "tensors-finite": judged.tensors_finite,
        "layers-trained": judged.layers_trained,
        "configuration": judged.configuration,
        "base-recorded": judged.base_recorded,
        "fits-base": judged.fits_base,
        "changes-the-base": judged.changes_the_base,
    }


def adapter_findings(folder: Path, base: Path | None = None) -> Iterator[Finding]:
    """Yield everything that is wrong with an adapter folder.

    Args:
        folder: The folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: The base checkpoint, or None: then it is looked for beside the folder and in the Hub's cache.

    Raises:
        PinError: If the base cannot be read or does not load.
    """
    for judge in cases(folder, base).values():
        yield from judge().findings


@dataclass(frozen=True)
class Judged:
    """An adapter folder under judgement; each method is one check.

    Attributes:
        folder: The folder.
        given: The base that the user named, or None.
    """

    folder: Path
    given: Path | None

    @cached_property
    def opened(self) -> Opened:
        """The files, as far as they can be read."""
        return open_adapter(self.folder)

    @cached_property
    def base(self) -> LocatedBase:
        """The base, if it is found."""
        return AdapterFolder(self.folder).locate_base(self.given)

    @cached_property
    def misconfigured(self) -> tuple[Finding, ...]:
        """What is wrong with the configuration alone."""
        return tuple(adapter_config.configuration_findings(self.opened))

    @cached_property
    def plan(self) -> adapter_names.Layout:
        """The adapter on its base without weights, or on a Mistral model as large as the tensors say."""
        return adapter_names.layout(self.opened, self.base.folder)

    @cached_property
    def numbers(self) -> Mapping[str, adapter_values.Numbers]:
        """The tensors, summed up."""
        return adapter_values.summed_up(inside(self.folder, Path(self.opened.place).name))

    @cached_property
    def named(self) -> tuple[Finding, ...]:
        """What is wrong with the names of the tensors."""
        return () if self.plan.refusal else tuple(adapter_names.name_findings(self.opened, self.plan))

    @property
    def _no_tensors(self) -> str:
        return "" if self.opened.tensors is not None else _UNREADABLE

    @property
    def _no_plan(self) -> str:
        """Why the tensors cannot be held against a configuration; empty where they can."""
        if self.opened.tensors is None or self.opened.config is None:
            return _UNREADABLE
        if self.misconfigured:
            return "the configuration is not sound: see the check `configuration`"
        try:
            return f"PEFT refuses the configuration: {self.plan.refusal}" if self.plan.refusal else ""
        except PinError:
            raise
        except InputError as error:
            return adapter_names.not_mistral(error)

    def files(self) -> Result:
        """Check that the files are there, are what they claim to be, and that nothing else claims to be them."""
        return Result(self.opened.findings)

    def tensors_complete(self) -> Result:
        """Check the names of the tensors against those that PEFT saves of this configuration."""
        if self._no_plan:
            return Result(not_checked=self._no_plan)
        return Result(self.named, facts=(("tensors", len(self.opened.tensors or {})),))

    def tensors_finite(self) -> Result:
        """Check every number, and the dtypes."""
        if self._no_tensors:
            return Result(not_checked=self._no_tensors)
        try:
            return Result(tuple(adapter_values.finite_findings(self.opened, self.numbers)))
        except InputError as error:
            return Result((Finding("ML405", error.found, error.place, "a file that safetensors loads"),))

    def layers_trained(self) -> Result:
        """Check that every layer has learned something, and something of its own."""
        try:
            if not self._no_tensors:
                return Result(tuple(adapter_values.trained_findings(self.opened, self.numbers)))
        except InputError:
            return Result(not_checked="the tensors cannot be loaded: see the check `tensors-finite`")
        return Result(not_checked=self._no_tensors)

    def configuration(self) -> Result:
        """Check the configuration, its names against the base's layers, and its rank against the tensors."""
        if self.opened.config is None:
            return Result(not_checked=_UNREADABLE)
        if self.misconfigured:
            return Result(self.misconfigured)
        try:
            plan = self.plan
        except PinError:
            raise
        except InputError as error:
            return Result(not_checked=adapter_names.not_mistral(error))
        findings = list(adapter_config.target_findings(self.opened, plan.modules, plan.linear, plan.unmatched))
        if plan.refusal and not findings:
            findings.append(Finding("ML408", f"PEFT refuses it: {plan.refusal}", self.opened.config_place))
        return Result((*findings, *adapter_names.rank_findings(self.opened, plan)))

    def base_recorded(self) -> Result:
        """Check that the configuration names the base, and one commit of it."""
        if self.opened.config is None:
            return Result(not_checked=_UNREADABLE)
        manifest = adapter_base.valid_manifest(self.folder) or {}
        pinned = bool(manifest.get("revision") or manifest.get("base_weights_sha256"))
        return Result(tuple(adapter_config.base_findings(self.opened, pinned)))

    def fits_base(self) -> Result:
        """Check shapes, vocabulary, tied embeddings, and that the base is not merged with the adapter already."""
        if self._no_plan:
            return Result(not_checked=self._no_plan)
        if self.base.folder is None:
            return Result(not_checked=self.base.missing)
        findings = [*adapter_names.shape_findings(self.opened, self.plan)]
        return Result((*findings, *adapter_base.fit_findings(self.opened, self.base.folder)))

    def changes_the_base(self) -> Result:
        """Check that the adapter, put on its base by PEFT, changes what it says."""
        if self._no_plan:
            return Result(not_checked=self._no_plan)
        if self.base.folder is None:
            return Result(not_checked=self.base.missing)
        before = (*self.named, *self.configuration().findings, *self.fits_base().findings)
        if any(finding.severity == "error" for finding in before):
            return Result(not_checked="adapter and base do not fit: see the checks before")
        if any(not one.finite for one in self.numbers.values()):
            return Result(not_checked="not every number is finite: see the check `tensors-finite`")
        if reason := adapter_base.enough_memory(self.base.folder):
            return Result(not_checked=reason)
        return Result(tuple(adapter_effect.effect_findings(self.opened, self.base.folder)))
