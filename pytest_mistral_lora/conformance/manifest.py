"""What a manifest declares, held against what can be seen of it: kind, dtypes, template, base, merge."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.reading.jsonl import read_json
from pytest_mistral_lora.checkpoint.weights import DTYPES, read_header
from pytest_mistral_lora.conformance.adapter.files import CONFIG, TENSORS, model_files, read_object
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import AdapterTarget
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records import manifest as records
from pytest_mistral_lora.records.adapter_folder import FARTHEST, AdapterFolder, LocatedBase
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.manifest import MANIFEST

if TYPE_CHECKING:
    from pytest_mistral_lora.records.verify.verify import Fact


_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")

Data = Mapping[str, Any]


def kind_findings(folder: Path, data: Data) -> Iterator[Finding]:
    """Yield a kind that is not what the folder holds: an adapter and a merged model must never be confused."""
    place = str(folder / MANIFEST)
    adapter = (folder / TENSORS).exists() or (folder / CONFIG).exists()
    model = bool(model_files(folder))
    if data["kind"] == "adapter" and model and not adapter:
        yield Finding("ML707", "kind is adapter, and the folder holds a full model", place, "merged")
    if data["kind"] == "merged" and adapter and not model:
        yield Finding("ML707", "kind is merged, and the folder holds an adapter", place, "adapter")
    if data["kind"] == "merged" and "lora" in data and "parent" not in data:
        yield Finding("ML707", "kind is merged, without a parent", place, "the adapter that was merged")
    if data["kind"] == "adapter" and "parent" in data:
        yield Finding("ML707", "kind is adapter, with the parent of a merged model", place, "merged")


def tensor_findings(folder: Path, data: Data) -> Iterator[Finding]:
    """Yield tensors of another dtype than the run declares."""
    declared = data.get("training", {}).get("adapter_dtype") if data["kind"] == "adapter" else None
    files = [TENSORS]
    if data["kind"] == "merged":
        declared, files = data.get("parent", {}).get("merge_dtype"), [file.name for file in model_files(folder)]
    expected = DTYPES.get(str(declared))
    for name in files if expected else []:
        try:
            dtypes = {info.dtype for info in read_header(inside(folder, name)).values()}
        except InputError:
            continue  # the facts say so
        if dtypes - {expected}:
            found = f"{name} is in {' and '.join(sorted(dtypes))}"
            yield Finding("ML709", found, str(folder / name), f"{declared}, as the manifest says")


def base_findings(base: Path, data: Data, folder: Path) -> Iterator[Finding]:
    """Yield what the run declares of its base and is not so: attention window, vocabulary."""
    from pytest_mistral_lora.checkpoint.base_model import read_config

    config, place = read_config(base), str(base / "config.json")
    if "sliding_window" in data.get("training", {}):
        recorded, window = data["training"]["sliding_window"], config.get("sliding_window")
        if recorded != window:
            found = f"sliding_window is {window}"
            yield Finding("ML709", found, place, f"{recorded}, as {folder / MANIFEST} says")
    size, rows = data.get("tokenizer", {}).get("vocab_size"), config.get("vocab_size")
    if isinstance(size, int) and isinstance(rows, int) and size > rows:
        found = f"vocab_size is {rows}, and the tokenizer has {size} ids"
        yield Finding("ML709", found, place, "at least as many embeddings as ids")


def merge_findings(folder: Path, data: Data) -> Iterator[Finding]:
    """Yield what a merged model's manifest says against it."""
    parent = data.get("parent") if data["kind"] == "merged" else None
    if parent is None:
        return
    place, dtype = str(folder / MANIFEST), parent["merge_dtype"]
    if dtype not in DTYPES:
        yield Finding("ML710", f"merged in {dtype}", place, "float32, bfloat16 or float16")
    farthest = parent.get("max_abs_logit_difference", 0.0)
    if farthest > FARTHEST.get(dtype, 1.0):
        found = f"logits are up to {farthest:.3g} from those of base and adapter"
        yield Finding("ML710", found, place, f"at most {FARTHEST.get(dtype, 1.0):g}")
    if parent.get("greedy_equal") is False and not parent.get("near_ties"):
        yield Finding("ML710", "it answers otherwise than base and adapter", place, "equal answers")


def template_findings(folder: Path, data: Data) -> Iterator[Finding]:
    """Yield each other place of the folder that stores another template than the one that was trained with.

    Marks of generation blocks do not count: they change no byte of the text.
    """
    if "template" not in data:
        return
    name = data["template"]["file"]
    try:
        trained = _without_marks(inside(folder, name).read_bytes().decode())
    except (InputError, OSError, ValueError):
        return  # the facts say so
    for file in ("tokenizer_config.json", "chat_template.json", "chat_template.jinja"):
        text = _stored_template(folder, file) if file != name else None
        if text is not None and _without_marks(text) != trained:
            digest = hashlib.sha256(text.encode()).hexdigest()
            found = f"another chat template, with SHA-256 {digest}"
            yield Finding("ML705", found, str(folder / file), f"that of {name}, which was trained with")


def _without_marks(template: str) -> str:
    return _GENERATION.sub("", template)


def _stored_template(folder: Path, name: str) -> str | None:
    try:
        if name.endswith(".jinja"):
            return inside(folder, name).read_bytes().decode()
        template = read_object(folder, name).get("chat_template")
    except (InputError, OSError, ValueError):
        return None
    return template if isinstance(template, str) else None


_RULES = {
    "ML703": ("base", "revision", "base_weights_sha256"),
    "ML705": ("tokenizer", "template"),
    "ML706": ("dataset", "dataset_sha256", "masking"),
    "ML710": ("parent",),
}
"""Rule of a fact by the first part of its name; ML702 for any other."""

_DECLARED = ("tokenizer.version", "tokenizer.vocab_size")
"""Facts that are no hash of a file, and whose rule is ML709."""

_LISTED = "the files of the run"
_SHOWN = 5
"""Files that are named of those that are not listed."""


def checks(target: AdapterTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of an adapter folder's manifest."""
    judged = Judged(target, settings)
    cases = {
        "schema": judged.schema,
        "facts": judged.facts,
        "base": judged.base_facts,
        "dataset": judged.dataset_facts,
        "declared": judged.declared,
        "files-listed": judged.files_listed,
    }
    for case, judge in cases.items():
        yield Check(target, "manifest", case, judge)


def manifest_findings(manifest: str | Path | Mapping[str, Any]) -> Iterator[Finding]:
    """Yield one finding for each violation of the schema.

    Args:
        manifest: A `manifest.json`, the folder that holds one, or its content.

    Raises:
        InputError: If the file cannot be read or is not JSON.
    """
    place, data = "", manifest
    if isinstance(manifest, str | Path):
        path = Path(manifest)
        path = path / records.MANIFEST if path.is_dir() else path
        place, data = f"{path}, ", read_json(path)
    for violation in records.violations(data):
        yield Finding("ML701", violation.found or "is missing", f"{place}{violation.path}", violation.expected)


def verify_findings(folder: Path, *, base: Path | None, dataset: Sequence[Path] | None) -> Iterator[Finding]:
    """Yield one finding for each recorded fact that is not true of the files."""
    from pytest_mistral_lora.records.verify.verify import verify

    yield from map(_mismatch, _mismatches(verify(folder, base=base, dataset=dataset)))


def _mismatches(facts: Sequence[Fact]) -> list[Fact]:
    return [fact for fact in facts if fact.state == "mismatch"]


def _mismatch(fact: Fact) -> Finding:
    says = f"{fact.name} {fact.found}" if _is_damage(fact) else f"{fact.name} is {fact.found}"
    return Finding(_rule(fact), says, fact.place, f"{fact.recorded}, as recorded")


def _rule(fact: Fact) -> str:
    if fact.is_unlisted:
        return "ML708"
    if _is_declared(fact):
        return "ML709"
    head = fact.name.partition(".")[0]
    return next((rule for rule, names in _RULES.items() if head in names), "ML702")


def _is_declared(fact: Fact) -> bool:
    """Say whether a fact can be told from a sound tokenizer; of a damaged one, its hash says enough."""
    return fact.name in _DECLARED and not _is_damage(fact)


def _is_damage(fact: Fact) -> bool:
    return str(fact.found).startswith("cannot be computed")


@dataclass(frozen=True)
class Judged:
    """A manifest under judgement; each method is one check.

    Attributes:
        target: The adapter's or merged model's folder.
        settings: What the run asks for.
    """

    target: AdapterTarget
    settings: Settings

    @cached_property
    def manifest(self) -> records.Manifest | None:
        """The manifest, or None where it is not valid."""
        if self.violations or self._absent:
            return None
        return records.validate(read_object(self.target.folder, records.MANIFEST))

    @property
    def data(self) -> Mapping[str, Any] | None:
        """Its content under today's names."""
        return None if self.manifest is None else self.manifest.data

    @cached_property
    def violations(self) -> tuple[Finding, ...]:
        """What is wrong with the file and its form."""
        try:
            data = read_object(self.target.folder, records.MANIFEST)
        except InputError as error:
            return () if self._absent else (Finding("ML701", error.found, error.place, error.expected or "JSON"),)
        place = self.target.folder / records.MANIFEST
        found = records.violations(data)
        return tuple(Finding("ML701", one.found or "is missing", f"{place}, {one.path}", one.expected) for one in found)

    @cached_property
    def base(self) -> LocatedBase:
        """The base, if it is found."""
        return AdapterFolder(self.target.folder).locate_base(self.target.base)

    @cached_property
    def verified(self) -> Sequence[Fact]:
        """Every fact, computed again as far as files are at hand."""
        from pytest_mistral_lora.records.verify.verify import verify

        return verify(
            self.target.folder,
            base=self.base.folder,
            base_missing=self.base.missing,
            dataset=self.target.dataset or None,
        )

    @property
    def _absent(self) -> bool:
        file = self.target.folder / records.MANIFEST
        return not file.exists() and not file.is_symlink()

    @property
    def _reason(self) -> str:
        return f"no {records.MANIFEST}" if self._absent else f"{records.MANIFEST} is not valid: see the check `schema`"

    def schema(self) -> Result:
        """Check that the manifest is there where it must be, and keeps its schema."""
        if self._absent and self.settings.require_manifest:
            place = str(self.target.folder)
            return Result((Finding("ML704", f"no {records.MANIFEST}", place, "the manifest of the run"),))
        if self._absent:
            return Result(not_checked=self._reason)
        absent = [] if self.manifest is None else self.manifest.not_recorded
        return Result(self.violations, facts=(("not recorded", ", ".join(absent)),) if absent else ())

    def facts(self) -> Result:
        """Check what is recorded of the files beside the manifest."""
        if self.data is None:
            return Result(not_checked=self._reason)
        result = self._facts("ML702", "ML705")
        return Result((*result.findings, *template_findings(self.target.folder, self.data)), result.not_checked)

    def base_facts(self) -> Result:
        """Check what is recorded of the base, against the configuration and the base itself."""
        return self._facts("ML703")

    def dataset_facts(self) -> Result:
        """Check what is recorded of the rows, which are encoded again."""
        return self._facts("ML706")

    def _facts(self, *rules: str) -> Result:
        if self.data is None:
            return Result(not_checked=self._reason)
        chosen = [fact for fact in self.verified if _rule(fact) in rules]
        absent = [f"{fact.name}: {fact.found}" for fact in chosen if fact.state == "not available"]
        matched = sum(fact.state == "match" for fact in chosen)
        return Result(
            tuple(map(_mismatch, _mismatches(chosen))), "; ".join(absent), facts=(("facts that match", matched),)
        )

    def declared(self) -> Result:
        """Check what the run declares against what can be seen of it."""
        if self.data is None:
            return Result(not_checked=self._reason)
        findings = (*kind_findings(self.target.folder, self.data), *self._declared())
        return Result(findings, "" if self.base.folder or findings else self.base.missing)

    def _declared(self) -> Iterator[Finding]:
        data = self.data or {}
        yield from map(_mismatch, filter(_is_declared, _mismatches(self.verified)))
        yield from tensor_findings(self.target.folder, data)
        yield from merge_findings(self.target.folder, data)
        if self.base.folder is not None:
            yield from base_findings(self.base.folder, data, self.target.folder)

    def files_listed(self) -> Result:
        """Check that every file of the folder is listed."""
        if self.data is None or "files" not in self.data:
            return Result(not_checked=self._reason if self.data is None else "the manifest lists no files")
        unlisted = [fact for fact in self.verified if fact.is_unlisted]
        findings = [
            Finding("ML708", f"{fact.name.removeprefix('files.')} is not listed", fact.place, _LISTED)
            for fact in unlisted[:_SHOWN]
        ]
        if rest := len(unlisted[_SHOWN:]):
            findings.append(Finding("ML708", f"{rest} more files are not listed", str(self.target.folder), _LISTED))
        return Result(tuple(findings))
