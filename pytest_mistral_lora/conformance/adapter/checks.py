"""Subject `adapter`: an adapter folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.adapter import configuration as config_checks
from pytest_mistral_lora.conformance.adapter import effect as effect_checks
from pytest_mistral_lora.conformance.adapter import layout as layout_checks
from pytest_mistral_lora.conformance.adapter import weights as weight_checks
from pytest_mistral_lora.conformance.adapter.checkpoints import checkpoint_findings
from pytest_mistral_lora.conformance.adapter.continued_run import ContinuedRun
from pytest_mistral_lora.conformance.adapter.named_base import named_base_findings
from pytest_mistral_lora.conformance.base_tokenizer import base_result, template_result, tokenizer_result
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result, findings_of, first_findings
from pytest_mistral_lora.conformance.folder_contents import TRAINER_PICKLES, other_files
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.errors import InputError, PinError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_config import CONFIG, PLAIN_STARTS
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors|adapter_model\.safetensors\.index\.json")
_ANOTHER_CLASS = "the base is of another class: see the check `placement`"
_UNREADABLE = "the files cannot be read: see the check `files`"
_UNLOADABLE = "the tensors cannot be loaded: see the check `tensors-finite`"
_SHOWN = 1000
"""Most findings of a check: as many as an adapter has tensors, but fewer than a hostile header has."""


def checks(target: AdapterTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of an adapter folder."""
    # only an adapter that a recipe made has known rows; the recipe's checks judge the base
    found = {**cases(target.adapter), **base_cases(target.adapter, judges_base=not target.trained_on)}
    for case, judge in found.items():
        yield Check(target, "adapter", case, judge)


def cases(folder: AdapterFolder) -> Mapping[str, Callable[[], Result]]:
    """Return the checks of an adapter, by name."""
    adapter = AdapterChecks(folder)
    return {
        "files": adapter.files,
        "other-files": adapter.other_files,
        "tensors-complete": adapter.tensors_complete,
        "tensors-finite": adapter.tensors_finite,
        "layers-trained": adapter.layers_trained,
        "placement": adapter.placement,
        "configuration": adapter.configuration,
        "base-recorded": adapter.base_recorded,
        "fits-base": adapter.fits_base,
        **({"initial-base": adapter.initial_base} if adapter.has_changed_start else {}),
        "changes-the-base": adapter.changes_the_base,
        **({"goes-on": adapter.run.judge} if adapter.run.is_known else {}),
    }


def base_cases(folder: AdapterFolder, *, judges_base: bool = True) -> Mapping[str, Callable[[], Result]]:
    """Return the checks of tokenizer and template beside an adapter, and of its base with `judges_base`."""
    found: dict[str, Callable[[], Result]] = {}
    if not folder.has_manifest:  # a manifest records both with their hashes: the subject `manifest` judges them
        found["tokenizer-of-base"] = partial(_tokenizer_of_base, folder)
        found["template-of-base"] = partial(template_result, folder)
    return found | ({"base-tokenizer": partial(base_result, folder)} if judges_base else {})


def _tokenizer_of_base(folder: AdapterFolder) -> Result:
    tensors = layout_checks.readable_tensors(folder)
    rows = [info.shape[0] for name, info in tensors.items() if name.endswith("embed_tokens.weight") and info.shape]
    return tokenizer_result(folder, max(rows, default=None))


def adapter_findings(folder: Path, base: Path | None = None, left: dict[str, str] | None = None) -> Iterator[Finding]:
    """Yield every fault of the folder of an adapter or a merged model.

    Args:
        folder: The folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: The base checkpoint, or None to look for it, as every command does; nothing is fetched.
        left: Filled with the reason of each check of weights that could not judge, by name.

    Raises:
        PinError: If the base cannot be read or does not load.
        ImportError: As for `findings_of`.
    """
    from pytest_mistral_lora.conformance.merged.checks import cases as merged_cases

    adapter = AdapterFolder(folder, BaseFolder(base) if base else None)
    target = AdapterTarget(folder.name, folder, given=adapter)
    found = merged_cases(adapter) if target.is_merged else {**cases(adapter), **base_cases(adapter)}
    yield from findings_of(found, left)
    # a folder without a tokenizer is not a gap, since the base's is used; nor is a file that no check reads
    for name in (*base_cases(adapter), "other-files"):
        (left or {}).pop(name, None)


class AdapterChecks:
    """The checks of an adapter folder: each method is a check, and they share all files and results."""

    def __init__(self, folder: AdapterFolder) -> None:
        self.folder = folder

    @cached_property
    def _unreadable(self) -> Mapping[Path, InputError]:
        """The errors of an adapter's two files, by file."""
        errors = {}
        for name, file in (("config", self.folder.config_file), ("tensors", self.folder.tensors_file)):
            try:
                getattr(self.folder, name)
            except InputError as error:
                errors[file] = error
        return errors

    @cached_property
    def run(self) -> ContinuedRun:
        """The run that wrote the adapter, if it went on from another one."""
        return ContinuedRun(self.folder)

    @property
    def has_changed_start(self) -> bool:
        """Whether the configuration names an initialisation that changes the base's own weights."""
        try:
            return self.folder.config.get("init_lora_weights") not in PLAIN_STARTS
        except InputError:
            return False

    @cached_property
    def _misconfigured(self) -> tuple[Finding, ...]:
        return tuple(config_checks.configuration_findings(self.folder))

    @cached_property
    def _layout(self) -> layout_checks.AdapterLayout:
        """The adapter on its base without weights; without a base, on a Mistral model as large as the tensors need."""
        return layout_checks.adapter_layout(self.folder, self.folder.located_base.folder)

    @cached_property
    def _summaries(self) -> Mapping[str, weight_checks.TensorSummary]:
        return weight_checks.summarize_tensors(self.folder.weights)

    @cached_property
    def _misnamed(self) -> tuple[Finding, ...]:
        return tuple(layout_checks.name_findings(self.folder, self._layout))

    @cached_property
    def _of_another_class(self) -> tuple[Finding, ...]:
        base = self.folder.located_base.folder
        return () if base is None or self._unreadable else tuple(config_checks.class_findings(self.folder, base))

    @cached_property
    def _dropped(self) -> tuple[Finding, ...]:
        base = self.folder.located_base.folder
        return () if base is None else tuple(config_checks.dropped_findings(self.folder, base))

    @property
    def _no_layout(self) -> str:
        """Why the tensors cannot be compared with the configuration; empty if they can."""
        if self._unreadable:
            return _UNREADABLE
        if self._of_another_class:
            return _ANOTHER_CLASS
        if self._dropped:
            return "the names are those of a text model alone: see the check `fits-base`"
        if self._misconfigured:
            return "the configuration is not sound: see the check `configuration`"
        try:
            return f"PEFT refuses the configuration: {self._layout.refusal}" if self._layout.refusal else ""
        except PinError:
            raise
        except InputError as error:
            return layout_checks.not_mistral(error)

    @property
    def _no_numbers(self) -> str:
        """Why the numbers cannot be used; empty if they can."""
        try:
            is_finite = all(summary.finite for summary in self._summaries.values())
        except InputError:
            return _UNLOADABLE
        return "" if is_finite else "not every number is finite: see the check `tensors-finite`"

    @property
    def _base(self) -> BaseFolder:
        return self.folder.located_base.require(self.folder.path)

    def files(self) -> Result:
        """Check that the files exist and match their names' formats, and that there are no other weights."""
        path, entries, findings = self.folder.path, sorted(self.folder.path.iterdir()), []
        for file in entries:
            if file.suffix in _PICKLES and not TRAINER_PICKLES.fullmatch(file.name):
                found = "weights in a pickle file: not loaded"
                findings.append(Finding("ML406", found, Place.of(file), f"safetensors only: {ADAPTER_TENSORS}"))
            if _SHARD.fullmatch(file.name):
                found = "a sharded adapter, which PEFT does not load"
                findings.append(Finding("ML405", found, Place.of(file), f"one file: {ADAPTER_TENSORS}"))
        if self.folder.model_files:
            found = f"full model weights: {', '.join(file.name for file in self.folder.model_files[:3])}"
            merged = "of a merged model, its manifest.json with kind merged and no adapter"
            findings.append(Finding("ML418", found, Place.of(path), f"an adapter and nothing else; {merged}"))
        # PEFT saves an adapter whose name is not `default` in a folder of that name
        below = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}")) if self._unreadable else []
        hint = f"; there is one in {', '.join(below[:3])}: name that folder" if below else ""
        for error in self._unreadable.values():
            rule = "ML406" if error.found.startswith("a pickle") else "ML405"
            expected = error.expected or f"an adapter: {CONFIG} and {ADAPTER_TENSORS}{hint}"
            findings.append(Finding(rule, error.found, error.place, expected))
        findings += checkpoint_findings(self.folder)
        return Result(tuple(findings))

    def other_files(self) -> Result:
        """Name the files that no check reads."""
        manifest = self.folder.valid_manifest
        return other_files(self.folder.path, None if manifest is None else manifest.data)

    def tensors_complete(self) -> Result:
        """Check the names of the tensors against those that PEFT saves for this configuration."""
        if not self._unreadable and not self.folder.tensors:  # whatever the base
            return Result((Finding("ML401", "the file holds no tensors", Place.of(self.folder.tensors_file)),))
        if self._no_layout:
            return Result(not_checked=self._no_layout)
        return Result(self._misnamed, facts=(("tensors", len(self.folder.tensors)),))

    def tensors_finite(self) -> Result:
        """Check every number, and the dtypes."""
        if self.folder.tensors_file in self._unreadable:
            return Result(not_checked=_UNREADABLE)
        try:
            found = list(weight_checks.finite_findings(self.folder, self._summaries))
        except InputError as error:
            found = [Finding("ML405", error.found, error.place, "a file that safetensors loads")]
        return Result(tuple(first_findings(found, _SHOWN, Place.of(self.folder.tensors_file))))

    def layers_trained(self) -> Result:
        """Check that every layer has learned something, and not the same as another layer."""
        if self.folder.tensors_file in self._unreadable:
            return Result(not_checked=_UNREADABLE)
        try:
            zeros = weight_checks.trained_findings(self.folder, self._summaries)
            found = [*zeros, *effect_checks.movement_findings(self.folder)]
            return Result(tuple(first_findings(found, _SHOWN, Place.of(self.folder.tensors_file))))
        except InputError:
            return Result(not_checked=_UNLOADABLE)

    def placement(self) -> Result:
        """Check that the layers belong to the text model, cover each named kind, and fit the class of the base."""
        if self._unreadable:
            return Result(not_checked=_UNREADABLE)
        try:
            found = config_checks.placement_findings(self.folder, self._summaries)
            return Result((*found, *self._of_another_class))
        except InputError:
            return Result(not_checked=_UNLOADABLE)

    def configuration(self) -> Result:
        """Check the configuration, its names against the base's layers, and its rank against the tensors."""
        if self.folder.config_file in self._unreadable:
            return Result(not_checked=_UNREADABLE)
        if self._misconfigured:
            return Result(self._misconfigured)
        if self._of_another_class:
            return Result(not_checked=_ANOTHER_CLASS)
        try:
            layout = self._layout
        except PinError:
            raise
        except InputError as error:
            return Result(not_checked=layout_checks.not_mistral(error))
        of_base = (layout.modules, layout.linear, layout.unmatched, layout.converted)
        findings = list(config_checks.target_findings(self.folder, *of_base))
        if layout.refusal and not findings:
            findings.append(Finding("ML408", f"PEFT refuses it: {layout.refusal}", Place.of(self.folder.config_file)))
        findings += layout_checks.rank_findings(self.folder, layout)
        if not findings:
            findings += config_checks.refusal_findings(self.folder, layout)
            findings += config_checks.scale_findings(self.folder, layout)
        return Result(tuple(findings), facts=config_checks.combined_facts(self.folder))

    def base_recorded(self) -> Result:
        """Check that the configuration names the base, one commit of it, and no other base than the one at hand."""
        if self.folder.config_file in self._unreadable:
            return Result(not_checked=_UNREADABLE)
        manifest = self.folder.valid_manifest.data if self.folder.valid_manifest else {}
        pinned = bool(manifest.get("revision") or manifest.get("base_weights_sha256"))
        findings = [*config_checks.base_findings(self.folder, pinned), *named_base_findings(self.folder)]
        return Result(tuple(findings))

    def fits_base(self) -> Result:
        """Check shapes, vocabulary, tied embeddings, and that the base does not already contain the adapter."""
        if self._dropped:
            return Result(self._dropped)
        if reason := self._no_layout or self.folder.located_base.missing:
            return Result(not_checked=reason)
        found = list(layout_checks.shape_findings(self.folder, self._layout))
        if not found:
            found += effect_checks.magnitude_findings(self.folder, self._layout, self._base)
        return Result((*found, *weight_checks.fit_findings(self.folder, self._base, self._layout.expected)))

    def initial_base(self) -> Result:
        """Check that the base lacks the part that an initialisation such as PiSSA took out."""
        if reason := self._no_layout or self.folder.located_base.missing or self._no_numbers:
            return Result(not_checked=reason)
        findings, undecided = effect_checks.start_findings(self.folder, self._layout, self._base)
        return Result(tuple(findings), not_checked=undecided)

    @cached_property
    def misfits(self) -> tuple[Finding, ...]:
        """The errors in names, configuration, shapes and start: PEFT's own errors for these would hide the cause."""
        found = (*self._misnamed, *self.configuration().findings, *self.fits_base().findings)
        found += self.initial_base().findings if self.has_changed_start else ()
        return tuple(finding for finding in found if finding.severity == "error")

    def changes_the_base(self) -> Result:
        """Check that the adapter, put on its base by PEFT, changes the base's logits."""
        if reason := self._no_layout or self.folder.located_base.missing:
            return Result(not_checked=reason)
        if self.misfits:
            return Result(not_checked="adapter and base do not fit: see the checks before")
        if reason := self._no_numbers or weight_checks.reason_not_to_load(self._base):
            return Result(not_checked=reason)
        return Result(tuple(weight_checks.effect_findings(self.folder, self._base)))
