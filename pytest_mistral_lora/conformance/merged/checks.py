"""The checks of a merged model's folder, against itself, its base, and the adapter that was merged into it."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.model_facts import ModelFacts, read_params
from pytest_mistral_lora.checkpoint.tokenizer_folder import MODEL_CONFIG, PARAMS
from pytest_mistral_lora.checkpoint.weights import DTYPES, Weights
from pytest_mistral_lora.conformance.base_tokenizer import template_result, tokenizer_result
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result, first_findings
from pytest_mistral_lora.conformance.folder_contents import other_files
from pytest_mistral_lora.conformance.merged import structure
from pytest_mistral_lora.conformance.merged import weights as tensors
from pytest_mistral_lora.conformance.merged.consolidated import consolidated_findings
from pytest_mistral_lora.conformance.merged.product import AdapterAtHand
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.conformance.tokenizer.configurations import configuration_findings
from pytest_mistral_lora.errors import InputError, MistralLoraError, PinError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import inside

_UNREADABLE = "the files cannot be read: see the check `files`"
_SHOWN = 5
_OLDER = ("files", "tensors-finite", "changes-the-base")


def checks(target: AdapterTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a merged model's folder; an adapter's folder has none."""
    if target.is_merged:
        # node ids are stable: with a manifest, these three were checks of `adapter` before this subject existed
        older = _OLDER if target.adapter.has_manifest else ()
        for case, judge in cases(target.adapter, target.beside).items():
            yield Check(target, "adapter" if case in older else "merged", case, judge)


def cases(folder: AdapterFolder, beside: Sequence[AdapterFolder] = ()) -> Mapping[str, Callable[[], Result]]:
    """Return the checks of a merged model, by name.

    Args:
        folder: The merged model's folder.
        beside: The folders of the run; one of them may be the adapter.
    """
    merged = MergedChecks(folder, beside)
    found = {
        "files": merged.files,
        "other-files": merged.other_files,
        "tensors-finite": merged.tensors_finite,
        "tie": merged.tie,
        "configuration": merged.configuration,
        "names-and-shapes": merged.names_and_shapes,
        "changes-the-base": merged.changes_the_base,
        "changed-places": merged.changed_places,
        "low-rank": merged.low_rank,
    }
    if merged.consolidated:
        found["mistral-format"] = merged.mistral_format
    if merged.adapters:
        found["adapter-product"] = merged.adapter_product
    # the manifest records tokenizer and template with their hashes: the subject `manifest` judges them
    if not folder.has_manifest:
        found["tokenizer-of-base"] = lambda: tokenizer_result(merged.folder, merged.vocabulary)
        found["template-of-base"] = lambda: template_result(merged.folder, is_model=True)
    return found


class MergedChecks:
    """The checks of a merged model's folder: each method is a check, and they share all files and results.

    Attributes:
        adapters: The adapters at hand.
    """

    def __init__(self, folder: AdapterFolder, beside: Sequence[AdapterFolder] = ()) -> None:
        self._given, self._place = folder, Place.of(folder.path)
        self.adapters: list[AdapterFolder] = [
            adapter for adapter in beside if adapter.config_file.is_file() and adapter.tensors_file.is_file()
        ]

    @cached_property
    def folder(self) -> AdapterFolder:
        """The folder; if it does not name its base, with the base of an adapter at hand."""
        if self._given.located_base.folder is not None:
            return self._given
        bases = (adapter.located_base.folder for adapter in self.adapters)
        return AdapterFolder(self._given.path, next((base for base in bases if base), None))

    def other_files(self) -> Result:
        """Name the files that no check reads."""
        manifest = self._given.valid_manifest
        return other_files(self._given.path, None if manifest is None else manifest.data)

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The object of `config.json`.

        Raises:
            InputError: If it is missing, leads out of the folder, or is not a JSON object.
        """
        inside(self._given.path, MODEL_CONFIG)
        data = self._given.checkpoint.read_json(MODEL_CONFIG)
        if not isinstance(data, dict):
            raise InputError(f"a JSON {type(data).__name__}", place=Place.of(self._given.path / "config.json"))
        return data

    @property
    def _weights(self) -> Weights:
        return self._given.model_weights

    @cached_property
    def _read_base(self) -> Weights | str | MistralLoraError:
        """The base's tensors; or the error of reading them, or why they cannot be compared."""
        try:
            base = self.folder.located_base
            if base.folder is None:
                return base.missing
            if base.folder.path.resolve() == self.folder.path.resolve():
                return "the base is this folder itself: give the base before merging"
            if base.folder.facts.is_packed:
                return f"the base {base.folder} is quantised: give the one in full precision"
            return base.folder.weights
        except MistralLoraError as error:
            return error

    @property
    def _base_weights(self) -> Weights | str:
        """The base's tensors, or why they cannot be compared."""
        read = self._read_base
        return f"the base cannot be read: {read}" if isinstance(read, MistralLoraError) else read

    @cached_property
    def _pairs(self) -> dict[str, str]:
        """The name of each tensor in the base, if it has one."""
        base = self._base_weights
        return {} if isinstance(base, str) else structure.paired_names(self._weights, base, self.vocabulary)

    @property
    def vocabulary(self) -> int | None:
        """`vocab_size` of the configuration: with more rows than the base's, the vocabulary was resized."""
        try:
            size = ModelFacts(self._config).vocabulary
        except InputError:
            return None
        return size if isinstance(size, int) else None

    @cached_property
    def _tensors(self) -> dict[str, tensors.MergedTensor]:
        base = self._base_weights
        pairs = {} if isinstance(base, str) else self._pairs
        return tensors.compare_tensors(self._weights, self._weights if isinstance(base, str) else base, pairs)

    @cached_property
    def _adapter(self) -> AdapterAtHand | None:
        """The adapter that explains the weights best; None if no adapter could be merged into this base."""
        base = self.folder.located_base.folder
        if isinstance(self._base_weights, str) or base is None:
            return None
        found = [
            AdapterAtHand(adapter, base, self._weights, self._base_weights, self._pairs) for adapter in self.adapters
        ]
        usable = [candidate for candidate in found if not candidate.missing]
        return min(usable or found, key=lambda candidate: len(candidate.findings), default=None)

    @property
    def _planned(self) -> Mapping[str, bool] | None:
        """The tensors that the adapter at hand changes, and whether each change has low rank."""
        return None if self._adapter is None or self._adapter.missing else self._adapter.planned

    @cached_property
    def _no_base(self) -> str:
        """Why there is no comparison with the base; empty if there is one."""
        try:
            base = self._base_weights
            if isinstance(base, str):
                return base
            return "" if self._weights else _UNREADABLE
        except InputError:
            return _UNREADABLE

    @cached_property
    def _not_compared(self) -> str:
        """Why no change of a layer can be judged; empty if it can be."""
        if self._no_base or any(tensors.LAYER.search(name) for name in self._pairs):
            return self._no_base
        return "no layer has its name and shape in the base: see the check `names-and-shapes`"

    def files(self) -> Result:
        """Check that the folder holds full weights in full precision, whole, and no adapter."""
        path, findings = self.folder.path, []
        # transformers looks for an adapter in the folder of any model that it loads
        for file in (self.folder.config_file, self.folder.tensors_file):
            if file.exists():
                found = f"{file.name} in a merged model's folder: transformers would put the adapter on once more"
                findings.append(Finding("ML418", found, Place.of(file), "full weights and no adapter"))
        try:
            if ModelFacts(self._config).quantization is not None:
                found, place = "the merged weights are quantised", Place.of(path / "config.json")
                findings.append(Finding("ML421", found, place, "full precision"))
            findings += structure.index_findings(path, self._weights)
            if not self._weights:
                names = ", ".join(file.name for file in self.folder.model_files)
                findings.append(Finding("ML405", "holds no tensor", Place.of(path / names), "the merged weights"))
        except InputError as error:
            findings.append(Finding("ML405", error.found, error.place, error.expected))
        return Result(tuple(findings), facts=(("kind", "merged"),))

    def tensors_finite(self) -> Result:
        """Check every number of the weights, and compare their dtype with the base's."""
        try:
            found = self._tensors
        except InputError:
            return Result(not_checked=_UNREADABLE)
        names = sorted(name for name, tensor in found.items() if not tensor.finite)
        wrong = [Finding("ML402", f"{name} is not finite", self._place, "finite numbers") for name in names]
        notes, base = [], self._base_weights
        if not isinstance(base, str):
            dtypes = [sorted({info.dtype for info in weights.infos.values()}) for weights in (self._weights, base)]
            if dtypes[0] and dtypes[0] != dtypes[1] and set(dtypes[0]) <= set(DTYPES.values()):
                found_dtypes, expected = (" and ".join(names) for names in dtypes)
                notes.append(Finding("ML437", f"the weights are in {found_dtypes}", self._place, expected))
        return Result((*first_findings(wrong, _SHOWN, self._place), *notes))

    def tie(self) -> Result:
        """Check the flags about tied embeddings against the file."""
        try:
            if not any(name.endswith("embed_tokens.weight") for name in self._weights):
                return Result(not_checked="no tensor is named embed_tokens.weight: see the check `names-and-shapes`")
            return Result(
                tuple(structure.tie_findings(self._config, self._weights, Place.of(self._given.path / "config.json")))
            )
        except InputError:
            return Result(not_checked=_UNREADABLE)

    def configuration(self) -> Result:
        """Check the configuration against the weights, and against the base's."""
        place = Place.of(self._given.path / "config.json")
        try:
            shapes = {name: info.shape for name, info in self._weights.infos.items()}
            findings = list(structure.own_findings(self._config, shapes, place))
            findings += self._configuration_findings(place)
        except InputError:
            return Result(not_checked=_UNREADABLE)
        try:
            base = self.folder.located_base
            if base.folder is None:
                findings += structure.answer_findings(self._given.checkpoint, None)
                return Result(tuple(findings), "" if findings else base.missing)
            findings += structure.difference_findings(self._config, base.folder.config, place)
            findings += structure.end_findings(self._given.checkpoint, base.folder)
            findings += structure.answer_findings(self._given.checkpoint, base.folder)
        except MistralLoraError as error:
            return Result(tuple(findings), "" if findings else f"the base cannot be read: {error}")
        return Result(tuple(findings))

    def _configuration_findings(self, place: Place) -> Iterator[Finding]:
        """Yield the findings of the tokenizer's folder about both configurations, and of one that cannot be read."""
        params = Place.of(self._given.path / PARAMS)
        given: Mapping[str, Any] = {}
        if (self._given.path / PARAMS).exists():
            try:
                given = read_params(inside(self._given.path, PARAMS))
            except InputError as error:
                yield Finding("ML243", error.found, params, "Mistral's own configuration, or no such file")
        yield from configuration_findings(self._config, place, given, params if given else None)

    def names_and_shapes(self) -> Result:
        """Check that the tensors have the base's names and shapes."""
        if self._no_base:
            if self._given.given_base is not None and isinstance(fault := self._read_base, MistralLoraError):
                # the same error as for an adapter
                raise PinError(fault.found, place=fault.place, expected=fault.expected)
            return Result(not_checked=self._no_base)
        assert not isinstance(self._base_weights, str)
        found = list(structure.name_findings(self._weights, self._base_weights, self._pairs, self._place))
        return Result(tuple(first_findings(found, _SHOWN, self._place)))

    def changes_the_base(self) -> Result:
        """Check that at least one weight differs from the base's."""
        if self._not_compared:
            return Result(not_checked=self._not_compared)
        compared, findings = [self._tensors[name] for name in self._pairs], []
        if all(tensor.unchanged for tensor in compared):
            expected = "other weights: merge again with merge_and_unload(), and save the model that it returns"
            findings.append(Finding("ML413", "every weight is the base's: nothing was merged", self._place, expected))
        for file in self._files_of_the_base:
            found = "the file is the base's, and a server that knows Mistral's format loads it"
            findings.append(Finding("ML413", found, Place.of(file), "no such file"))
        return Result(tuple(findings), facts=(("changed tensors", sum(not tensor.unchanged for tensor in compared)),))

    @cached_property
    def consolidated(self) -> list[Path]:
        """The files of weights in Mistral's own format."""
        return sorted(self._given.path.glob("consolidated*.safetensors"))

    @cached_property
    def _files_of_the_base(self) -> list[Path]:
        """Those of `consolidated` that are the base's: a merge into a copy of the base's folder leaves them there."""
        base = self.folder.located_base.folder
        pairs = [(file, base.path / file.name) for file in self.consolidated] if base is not None else []
        return [file for file, other in pairs if other.is_file() and filecmp.cmp(file, other, shallow=False)]

    def mistral_format(self) -> Result:
        """Check that weights in Mistral's own format are the merged ones."""
        if not self._not_compared and self._files_of_the_base:
            return Result(not_checked="the file is the base's: see the check `changes-the-base`")
        try:
            weights = Weights(self.consolidated)
            found = list(consolidated_findings(weights, self._weights, self._config, Place.of(self.consolidated[0])))
        except InputError as error:
            return Result(not_checked=str(error))
        return Result(tuple(first_findings(found, _SHOWN, self._place)))

    def changed_places(self) -> Result:
        """Check that an adapter's weights changed in every layer, and no other weights."""
        if self._not_compared:
            return Result(not_checked=self._not_compared)
        findings = [*tensors.place_findings(self._tensors, self._place, self._planned)]
        if self._planned is None:
            files = {name: info.file.name for name, info in self._weights.infos.items()}
            findings += tensors.layer_findings(self._tensors, self._given.path, files=files, declared=self._declared)
        return Result(tuple(findings))

    @property
    def _declared(self) -> Sequence[str]:
        """The modules that the adapter changes, as the manifest of the merged model says; empty if it does not."""
        manifest = self.folder.valid_manifest
        modules = ((manifest.data.get("lora") if manifest else None) or {}).get("modules")
        return modules if isinstance(modules, list) else ()

    def low_rank(self) -> Result:
        """Check that an adapter can have made the change of each matrix: low rank, and not too large."""
        if reason := self._not_compared or self._dequantized:
            return Result(not_checked=reason)
        ranks = [tensor.rank for tensor in self._tensors.values() if tensor.rank is not None]
        findings = tensors.rank_findings(self._tensors, self._place, self._planned)
        return Result(tuple(findings), facts=(("highest rank", max(ranks)),) if ranks else ())

    @property
    def _dequantized(self) -> str:
        """Why the difference from the base need not have low rank; empty if it must."""
        manifest = self.folder.valid_manifest
        parent = (manifest.data.get("parent") if manifest else None) or {}
        return "merged into dequantised weights, which are not the base's" if parent.get("dequantized") else ""

    def adapter_product(self) -> Result:
        """Check that the difference from the base is the adapter's own product."""
        if reason := self._not_compared or self._dequantized:
            return Result(not_checked=reason)
        adapter = self._adapter
        if adapter is None or adapter.missing:
            return Result(not_checked=adapter.missing if adapter else "no adapter")
        return Result(adapter.findings, facts=(("adapter", str(adapter.folder.path)),))
