"""Subject `manifest`: whether a folder's record is valid and agrees with the files, the base and the rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import existing_path, read_json
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes
from pytest_mistral_lora.checkpoint.tokenizer_folder import in_folder, template_places
from pytest_mistral_lora.checkpoint.weights import DTYPES
from pytest_mistral_lora.conformance.base_tokenizer import GENERATION
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result, first_findings
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.adapter_folder import FARTHEST, AdapterFolder
from pytest_mistral_lora.records.deployment import conflicts, deployed
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.git import is_in_repository
from pytest_mistral_lora.records.manifest import DEPLOYMENT, MANIFEST, violations
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS
from pytest_mistral_lora.records.verify import PROOF, START, FieldCheck, verify

_RULES = {
    "ML703": ("base", "revision", "base_weights_sha256"),
    "ML705": ("tokenizer", "template"),
    "ML706": ("dataset", "dataset_sha256", "masking"),
    "ML710": ("parent",),
    "ML711": ("base_config",),
}
"""Rule of a field by the first part of its name; ML702 for any other."""

_DECLARED = ("tokenizer.version", "tokenizer.vocab_size")
"""Fields that are not hashes of files; their rule is ML709."""

_YOURS = "evaluation.yours"
"""Beginning of the names of the fields about files that the user's commands left."""

_LISTED = "the files of the run"
_SHOWN = 5
"""Most unlisted files to name."""


def checks(target: AdapterTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of an adapter folder's manifest."""
    judged = ManifestChecks(target, settings)
    cases: dict[str, Callable[[], Result]] = {
        "schema": judged.schema,
        "facts": judged.facts,
        "base": partial(judged.recomputed, "ML703"),
        "base-config": partial(judged.recomputed, "ML711"),
        "dataset": partial(judged.recomputed, "ML706"),
        "declared": judged.declared,
        "restated": partial(judged.recomputed, "ML716"),
        "files-listed": judged.files_listed,
    }
    if is_in_repository(target.adapter.path):
        cases["history"] = partial(judged.recomputed, "ML712")
    if judged.has_start:
        cases["start"] = partial(judged.recomputed, "ML715")
    if judged.is_deployed:
        cases["deployment"] = judged.deployment
    for case, judge in cases.items():
        yield Check(target, "manifest", case, judge)


def manifest_findings(manifest: str | Path | Mapping[str, Any]) -> Iterator[Finding]:
    """Yield one finding for each violation of the schema.

    Args:
        manifest: A `manifest.json`, the folder that holds one, or its content.

    Raises:
        InputError: If the file is missing, cannot be read, or is not JSON.
    """
    place, data = NOWHERE, manifest
    if not isinstance(manifest, Mapping):
        path = existing_path(manifest, f"a {MANIFEST}, or the folder that holds one")
        path = existing_path(path / MANIFEST, f"a {MANIFEST}", folder=False) if path.is_dir() else path
        place, data = Place.of(path), read_json(path)
    for violation in violations(data):
        yield Finding("ML701", violation.found or "is missing", place.within(*violation.place.part), violation.expected)


def verify_findings(folder: Path, *, base: Path | None, dataset: Sequence[Path] | None) -> Iterator[Finding]:
    """Yield one finding for each recorded value that differs from the recomputed one."""
    from pytest_mistral_lora.formats.sources import recorded_file

    fields = verify(folder, base=base, dataset=dataset, open_file=recorded_file)
    yield from (mismatch_finding(field) for field in fields if field.state == "mismatch")


def mismatch_finding(field: FieldCheck, manifest: Path | None = None) -> Finding:
    """Return the finding of a recorded value that differs from the recomputed one.

    Args:
        field: The value.
        manifest: The file that records it, for a value without a place; None for no place.
    """
    place = field.place or (NOWHERE if manifest is None else Place.of(manifest))
    if field.is_unlisted:
        return Finding("ML708", f"{field.name.removeprefix('files.')} is not listed", place, _LISTED)
    if _rule_of(field) == "ML712":
        return Finding("ML712", str(field.found), place, f"no less than {field.recorded}")
    if field.again:
        return Finding("ML716", f"{field.name} is {field.recorded}", place, f"{field.found}, as {field.again} says")
    found = f"{field.name} {field.found}" if _is_damaged(field) else f"{field.name} is {field.found}"
    return Finding(_rule_of(field), found, place, f"{field.recorded}, as recorded")


def _folded(fields: Iterable[FieldCheck]) -> Iterator[Finding]:
    """Yield the findings of mismatches; those that follow from a data file that is missing, or is another, name it.

    Of other bytes, each hash and number of rows, ids and labels is another one, too: it says nothing of its own. Of a
    missing file, none can be computed, and the check of the rows reports the file.
    """
    fields = list(fields)
    has_changed = any(map(_is_data_file, fields))
    for field in fields:
        finding = mismatch_finding(field)
        if finding.rule == "ML706" and field.place and not Path(field.place.source.name).exists():
            finding = replace(finding, effect_of="ML602")
        elif finding.rule == "ML706" and has_changed and not _is_data_file(field):
            finding = replace(finding, effect_of="ML706")
        yield finding


def _is_data_file(field: FieldCheck) -> bool:
    return re.fullmatch(r"dataset\.(eval_)?files\[\d+\]\.sha256", field.name) is not None


def value_results(fields: Iterable[FieldCheck], manifest: Path) -> Iterator[tuple[str, Result]]:
    """Yield the name and the result of each recorded value: a mismatch is a finding, a missing source is not checked.

    Args:
        fields: The recorded values.
        manifest: The file that records them, for findings without a place.
    """
    for field in fields:
        facts = tuple((name, getattr(field, name)) for name in ("state", "recorded", "found"))
        if field.state == "mismatch":
            yield field.name, Result((mismatch_finding(field, manifest),), facts=facts)
        else:
            reason = str(field.found) if field.state == "not available" else ""
            yield field.name, Result(not_checked=reason, facts=facts)


def _rule_of(field: FieldCheck) -> str:
    if field.is_unlisted:
        return "ML708"
    if field.again:
        return "ML716"
    if field.name in (PROOF, f"parent.{PROOF}"):
        return "ML712"
    if field.name.startswith(f"{START}."):
        return "ML715"
    if field.name in _DECLARED and not _is_damaged(field):
        return "ML709"
    head = field.name.partition(".")[0]
    return next((rule for rule, names in _RULES.items() if head in names), "ML702")


def _is_damaged(field: FieldCheck) -> bool:
    return str(field.found).startswith("cannot be computed")


class ManifestChecks:
    """The checks of a manifest: each method is a check, and they share all files and results.

    Attributes:
        target: The adapter's or merged model's folder.
        settings: The options of the run.
        folder: The folder with its files.
    """

    def __init__(self, target: AdapterTarget, settings: Settings) -> None:
        self.target: AdapterTarget = target
        self.settings: Settings = settings
        self.folder: AdapterFolder = target.adapter

    @property
    def _data(self) -> Mapping[str, Any] | None:
        """The content under today's names; None if the manifest is missing or invalid."""
        return self.folder.valid_manifest.data if self.folder.valid_manifest else None

    @property
    def has_start(self) -> bool:
        """Whether it records an adapter that the run went on from."""
        return bool(self._data and "start" in self._data.get("lora", {}))

    @cached_property
    def _fields(self) -> Sequence[FieldCheck]:
        """Every recorded value, recomputed if its source exists."""
        from pytest_mistral_lora.formats.sources import recorded_file

        located, dataset = self.folder.located_base, self.target.trained_on or None
        return verify(self.folder, base=located, dataset=dataset, open_file=recorded_file)

    @property
    def _reason(self) -> str:
        """Why nothing is checked; empty with a valid manifest."""
        if self.folder.has_manifest:
            return f"{MANIFEST} is not valid: see the check `schema`"
        return f"{MANIFEST} is one of another tool" if self.folder.manifest_file.exists() else f"no {MANIFEST}"

    def schema(self) -> Result:
        """Check that a required manifest exists, and that it keeps its schema."""
        if not self.folder.has_manifest:
            if not self.settings.require_manifest:
                return Result(not_checked=self._reason)
            return Result((Finding("ML704", self._reason, Place.of(self.folder.path), "the manifest of the run"),))
        place = Place.of(self.folder.manifest_file)
        try:
            data = self.folder.manifest_data
            if not isinstance(data, dict):
                raise InputError(f"a JSON {type(data).__name__}", place=place, expected="a JSON object")
        except InputError as error:
            return Result((Finding("ML701", error.found, error.place, error.expected or "JSON"),))
        findings = (
            Finding("ML701", violation.found or "is missing", place.within(*violation.place.part), violation.expected)
            for violation in violations(data)
        )
        missing = self.folder.valid_manifest.not_recorded if self.folder.valid_manifest else ()
        return Result(tuple(findings), facts=(("not recorded", ", ".join(missing)),) if missing else ())

    def facts(self) -> Result:
        """Check the recorded values of the files beside the manifest, and the other places of the chat template."""
        if self._data is None:
            return Result(not_checked=self._reason)
        result = self.recomputed("ML702", "ML705")
        findings, folder = [*result.findings], self.folder.path
        recorded_file = self._data.get("template", {}).get("file")
        trained_file = Place.of(recorded_file) if recorded_file is not None else NOWHERE
        # an unreadable file is already a finding of its hash or of the subject `tokenizer`
        files = self.folder.checkpoint.tokenizer_files
        places = template_places(files).get("default", {}) if trained_file else {}
        for place, text in places.items() if trained_file in places else ():
            if GENERATION.sub("", text) != GENERATION.sub("", places[trained_file]):
                found = f"another chat template, with SHA-256 {sha256_bytes(text.encode())}"
                expected = f"that of {trained_file}, which was trained with"
                findings.append(Finding("ML705", found, in_folder(folder, place).whole, expected))
        return Result(tuple(findings), result.not_checked)

    def recomputed(self, *rules: str) -> Result:
        """Check the recorded values of some rules, as far as their sources exist."""
        if self._data is None:
            return Result(not_checked=self._reason)
        chosen = [field for field in self._fields if _rule_of(field) in rules]
        # what the user's commands left may lie anywhere: without it, the record of the run is checked all the same
        unavailable = [field for field in chosen if field.state == "not available"]
        missing = [f"{field.name}: {field.found}" for field in unavailable if not field.name.startswith(_YOURS)]
        matched = sum(field.state == "match" for field in chosen)
        findings = tuple(_folded(field for field in chosen if field.state == "mismatch"))
        return Result(findings, "; ".join(missing), facts=(("facts that match", matched),))

    def declared(self) -> Result:
        """Check the properties that the run declares: kind, dtypes, attention window, vocabulary, merge."""
        if self._data is None:
            return Result(not_checked=self._reason)
        # the hash of a damaged tokenizer is already a finding of `facts`
        declared = (field for field in self._fields if field.state == "mismatch" and _rule_of(field) == "ML709")
        findings: list[Finding] = []
        # an adapter and a merged model must never be confused
        kind, place = self._data["kind"], Place.of(self.folder.manifest_file)
        adapter = self.folder.tensors_file.exists() or self.folder.config_file.exists()
        if kind == "adapter" and self.folder.model_files and not adapter:
            findings.append(Finding("ML707", "kind is adapter, and the folder holds a full model", place, "merged"))
        if kind == "merged" and adapter and not self.folder.model_files:
            findings.append(Finding("ML707", "kind is merged, and the folder holds an adapter", place, "adapter"))
        if kind == "adapter" and "parent" in self._data:
            findings.append(Finding("ML707", "kind is adapter, with the parent of a merged model", place, "merged"))
        findings += map(mismatch_finding, declared)
        findings += [*self._dtype_findings(self._data), *self._merge_findings(self._data)]
        # shapes and windows are in the base's configuration: its weights are not needed
        base = self.folder.located_base
        if base.folder is not None:
            findings += self._base_findings(self._data, base.folder)
        return Result(tuple(findings), "" if base.folder or findings else base.missing)

    @property
    def is_deployed(self) -> bool:
        """Whether the manifest says which path production serves."""
        return bool(self._data and self._data.get(DEPLOYMENT))

    def deployment(self) -> Result:
        """ML713: no folder before this one, among those of the run, claims its name for another deployment."""
        if self._data is None:
            return Result(not_checked=self._reason)
        path, manifests = self.folder.path, dict[Path, Mapping[str, Any]]()
        for folder in (*self.target.beside, self.folder):
            if folder.path.is_dir() and folder.valid_manifest is not None:
                manifests[folder.path] = folder.valid_manifest.data
        name = self._data[DEPLOYMENT]["name"]
        findings = [
            Finding(
                "ML713",
                f"{other} and {here} claim the name {name}: {why}",
                Place.of(self.folder.manifest_file).within(DEPLOYMENT, "name"),
                "one folder for each name",
            )
            for other, here, why in conflicts(manifests)
            if here == path
        ]
        return Result(tuple(findings), facts=(("deployment", deployed(self._data)),))

    def _dtype_findings(self, data: Mapping[str, Any]) -> Iterator[Finding]:
        declared, names = data.get("training", {}).get("adapter_dtype"), [ADAPTER_TENSORS]
        if data["kind"] == "merged":
            declared = data.get("parent", {}).get("merge_dtype")
            names = [file.name for file in self.folder.model_files]
        expected = DTYPES.get(str(declared))
        for name in names if expected else []:
            try:
                dtypes = {info.dtype for info in self.folder.checkpoint.header(inside(self.folder.path, name)).values()}
            except InputError:
                continue  # its hash is already a finding
            if dtypes - {expected}:
                found, place = f"{name} is in {' and '.join(sorted(dtypes))}", Place.of(self.folder.path / name)
                yield Finding("ML709", found, place, f"{declared}, as the manifest says")

    def _merge_findings(self, data: Mapping[str, Any]) -> Iterator[Finding]:
        parent = data.get("parent") if data["kind"] == "merged" else None
        if parent is None:
            return
        place, dtype = Place.of(self.folder.manifest_file), parent["merge_dtype"]
        if dtype not in DTYPES:
            yield Finding("ML710", f"merged in {dtype}", place, "float32, bfloat16 or float16")
        farthest, allowed = parent.get("max_abs_logit_difference", 0.0), FARTHEST.get(dtype, 1.0)
        if farthest > allowed:
            found = f"logits are up to {farthest:.3g} from those of base and adapter"
            yield Finding("ML710", found, place, f"at most {allowed:g}")
        if parent.get("greedy_equal") is False and not parent.get("near_ties"):
            yield Finding("ML710", "it answers otherwise than base and adapter", place, "equal answers")

    def _base_findings(self, data: Mapping[str, Any], base: BaseFolder) -> Iterator[Finding]:
        facts, place = base.facts, Place.of(base.config_file)
        # a configuration that differs from training is another finding
        wrong = {field.name for field in self._fields if field.state == "mismatch"}
        if "sliding_window" in data.get("training", {}) and "base_config.sliding_window" not in wrong:
            recorded, window = data["training"]["sliding_window"], facts.window
            if recorded != window:
                expected = f"{recorded}, as {self.folder.manifest_file} says"
                yield Finding("ML709", f"sliding_window is {window}", place, expected)
        size, rows = data.get("tokenizer", {}).get("vocab_size"), facts.vocabulary
        if isinstance(size, int) and isinstance(rows, int) and size > rows and "base_config.vocab_size" not in wrong:
            found = f"vocab_size is {rows}, and the tokenizer has {size} ids"
            yield Finding("ML709", found, place, "at least as many embeddings as ids")

    def files_listed(self) -> Result:
        """Check that the manifest lists every file of the folder."""
        if self._data is None or "files" not in self._data:
            return Result(not_checked=self._reason if self._data is None else "the manifest lists no files")
        findings = [mismatch_finding(field) for field in self._fields if field.is_unlisted]
        return Result(tuple(first_findings(findings, _SHOWN, Place.of(self.folder.path))))
