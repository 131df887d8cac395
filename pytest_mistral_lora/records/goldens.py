"""Rendering goldens: files that are test cases, recorded from mistral-common and checked for form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import EncodedRow, Span
from pytest_mistral_lora.chat.fields import ROLES
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.kinds.records import parse_rows, parse_trained
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.oracle.versions import VersionFacts, versions_between
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, MistralLoraError, RowError
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.files import Written, put_text, write_text
from pytest_mistral_lora.records.schema import RECORD, RecordSchema, Violation, require_valid

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

SCHEMA_VERSION = 1


@cache
def goldens_folder() -> Path:
    """Return the folder of the packaged goldens: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "goldens"
    return installed if installed.is_dir() else package.parent / "goldens"


SCHEMA = RecordSchema(goldens_folder() / "schema.json", definition="golden")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedCase:
    """A record that is packaged, of any kind.

    Attributes:
        name: Name of the case.
        description: Its purpose, in one sentence.
        versions: Tokenizer versions that can encode it.
        needs: Fields of `RowFeatures` that its tokenizer must have.
    """

    name: str
    description: str
    versions: frozenset[VersionFacts]
    needs: tuple[str, ...] = ()

    def fits(self, oracle: Oracle) -> bool:
        """Return whether a tokenizer can encode the record."""
        return oracle.facts in self.versions and all(getattr(oracle.features, name) for name in self.needs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(PackagedCase):
    """A row to record goldens from.

    Attributes:
        row: The chat row.
    """

    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCase(PackagedCase):
    """A preference pair to give to trainers.

    Attributes:
        rows: The chosen and the rejected side.
        is_refused: Whether mistral-common encodes one of the answers under no version: a trainer can only refuse it.
    """

    rows: tuple[Row, ...]
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class Golden:
    """A recorded case.

    Attributes:
        case: Name of the case.
        description: Its purpose.
        tokenizer: `file`, `version` and `sha256` of the tokenizer that it was recorded with.
        recorded_with: Library versions that it was recorded with.
        row: The chat row.
        encoded: Its ids, labels and spans.
        deviations: Named deviations that the official chat template shows on the row.
        path: The file.
    """

    case: str
    description: str
    tokenizer: Mapping[str, str]
    recorded_with: Mapping[str, str]
    row: Row
    encoded: EncodedRow
    deviations: tuple[str, ...]
    path: Path

    def write(self) -> None:
        """Write the golden to its path, atomically."""
        write_text(self.path, self.text())

    def put(self, before: Golden | None) -> Written:
        """Write the golden to its path, unless the file differs from it only in library versions.

        Args:
            before: The golden in the file; None if there is no file.

        Raises:
            InputError: If it cannot be written.
        """
        # an upgrade that changes no result should change no file
        same = before is not None and replace(before, recorded_with=self.recorded_with) == self
        return put_text(self.path, self.text(), keep=same)

    def text(self) -> str:
        """Return the file's text; each field stays on one line, so that a diff shows the change."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "case": self.case,
            "description": self.description,
            "tokenizer": dict(self.tokenizer),
            "recorded_with": dict(self.recorded_with),
            "row": self.row.to_json(),
            "input_ids": list(self.encoded.input_ids),
            "labels": list(self.encoded.labels or ()),
            "spans": [span.to_json() for span in self.encoded.spans],
            "deviations": list(self.deviations),
        }
        # one field a line: indented ids would take a thousand lines, and one line for all would hide a change
        lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items()]
        return "{\n  " + ",\n  ".join(lines) + "\n}\n"


@cache
def shipped_hashes() -> dict[str, str]:
    """Return the SHA-256 of each tokenizer file that the packaged goldens were recorded with, by our name."""
    data = read_json(goldens_folder() / "provenance.json")
    return {name: tokenizer["sha256"] for name, tokenizer in data["tokenizers"].items()}


def packaged_cases() -> list[Case]:
    """Return the rows that the packaged goldens are recorded from.

    Raises:
        TokenizerError: If a case names a version that is not supported.
    """
    return [
        Case(row=parse_row(data["row"], place=place), **_shared_fields(data, place))
        for place, data in _read_cases("cases.json")
    ]


def packaged_pairs() -> list[PairCase]:
    """Return the preference pairs that trainers are given: for the tests, and `audit --task`.

    Raises:
        TokenizerError: If a case names a version that is not supported.
    """
    return [
        PairCase(
            rows=parse_rows(data["row"], place=place),
            is_refused=data.get("refused", False),
            **_shared_fields(data, place),
        )
        for place, data in _read_cases("pairs.json")
    ]


def _read_cases(name: str) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Yield the place and the data of each case of a packaged file."""
    path = goldens_folder() / name
    for data in read_json(path):
        yield Place.of(path) / data["case"], data


def _shared_fields(data: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return the fields of a `PackagedCase`; a case without versions is for all versions."""
    return {
        "name": data["case"],
        "description": data["description"],
        "versions": versions_between(data.get("since"), data.get("until"), place=place),
        "needs": tuple(data.get("needs", ())),
    }


def packaged_golden(sha256: str, case: str) -> Golden:
    """Return the packaged golden of a case for the tokenizer file with this SHA-256.

    Raises:
        InputError: If the file has no packaged goldens, or no such case.
    """
    name = next((name for name, digest in shipped_hashes().items() if digest == sha256), None)
    if name is None:
        raise InputError(f"no packaged goldens for a tokenizer file with SHA-256 {sha256}")
    paths = {path.stem: path for path in golden_paths(goldens_folder() / "templates" / name)}
    if case not in paths:
        raise InputError(f"no packaged case {case!r} for {name}", expected="one of " + ", ".join(paths))
    return load(paths[case])


def record(case: Case, tokenizer: CheckpointTokenizer, folder: Path) -> Golden:
    """Record a case under a tokenizer; nothing is written.

    Args:
        case: The row, with its name and description.
        tokenizer: The tokenizer file or checkpoint folder.
        folder: The folder of the golden: `folder/<case>.json`.

    Raises:
        OracleRejection: If mistral-common refuses the row.
        MistralLoraError: If no named deviation explains a difference of the template.
    """
    from pytest_mistral_lora.chat.templates.compare import compare

    oracle = tokenizer.oracle
    # chat templates have a layout of conversations alone
    comparison = compare(case.row, oracle, tokenizer.template) if case.row.kind.is_chat else None
    # a golden must not record a fault as expected
    if comparison is not None and comparison.unexplained:
        raise MistralLoraError(
            f"the chat template differs from mistral-common: {comparison.unexplained}",
            place=Place.of(tokenizer.path) / f"case {case.name}",
            next_step="Mend the template or the row before it is recorded.",
        )
    return Golden(
        case=case.name,
        description=case.description,
        tokenizer={"file": oracle.path.name, "version": oracle.version, "sha256": oracle.sha256},
        recorded_with=library_versions(),
        row=case.row,
        encoded=oracle.encode(case.row) if comparison is None else comparison.oracle,
        deviations=() if comparison is None else comparison.deviations,
        path=folder / f"{case.name}.json",
    )


def golden_paths(folder: Path) -> list[Path]:
    """Return the golden files of a folder, of renderings or of transcripts, by name."""
    return sorted(folder.glob("*.json"))


def load(path: Path) -> Golden:
    """Load a golden.

    Raises:
        InputError: If it is not JSON, breaks the schema, or contradicts itself; every violation is named.
    """
    data = read_json(path)
    require_valid(violations(data, path.stem), "rendering golden", path)
    return Golden(
        data["case"],
        data["description"],
        data["tokenizer"],
        data["recorded_with"],
        parse_trained(data["row"], place=Place.of(path)),
        _encoded(data),
        tuple(data["deviations"]),
        path,
    )


def violations(data: Any, name: str) -> list[Violation]:
    """Return the violations of a golden: of its schema, its name, its row, and its labels and spans."""
    found = SCHEMA.violations(data)
    if found:
        return found
    if data["case"] != name:
        found.append(Violation(RECORD / "case", f"{data['case']!r}, but the file is {name}.json"))
    try:
        parse_trained(data["row"])
    except RowError as error:
        found.append(Violation(RECORD / "row", str(error)))
    known = {None, *ROLES, *(role for kind in KINDS.values() for role in kind.roles)}
    unknown = (n for n, span in enumerate(data["spans"]) if span["role"] not in known)
    found += (Violation(RECORD.within("spans", n, "role"), repr(data["spans"][n]["role"])) for n in unknown)
    encoded = _encoded(data)
    ids, spans, labels = encoded.input_ids, encoded.spans, encoded.labels or ()
    edges = [0, *(span.end for span in spans)]
    if edges[:-1] != [span.start for span in spans] or edges[-1] != len(ids) or sorted(set(edges)) != edges:
        return [*found, Violation(RECORD / "spans", "they do not partition input_ids in order")]
    expected = EncodedRow.from_spans(ids, spans).labels or ()
    if labels != expected:
        at = next((n for n, pair in enumerate(zip(labels, expected, strict=False)) if pair[0] != pair[1]), len(ids))
        found.append(Violation(RECORD / "labels", f"differ from what the spans say, first at token {at}"))
    return found


def _encoded(data: Mapping[str, Any]) -> EncodedRow:
    """Return ids, labels and spans of a golden that its schema accepts: to JSON, 2.0 is an integer, too."""
    ids, labels = (tuple(map(int, data[name])) for name in ("input_ids", "labels"))
    spans: list[dict[str, Any]] = [
        {key: int(value) if isinstance(value, float) else value for key, value in span.items()}
        for span in data["spans"]
    ]
    return EncodedRow(ids, labels, tuple(Span(**span) for span in spans))


ID_LIBRARIES = ("mistral-common", "transformers", "tokenizers")
"""The libraries that decide ids."""


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide ids."""
    return {name: version(name) for name in ID_LIBRARIES}


def check_case_name(name: str, *, place: Place = NOWHERE) -> str:
    """Return a case name that is safe as a file name.

    Raises:
        InputError: If it could leave its folder or is not portable.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(f"case name {name!r}", place=place, expected="letters, digits, dots, dashes and underscores")
    return name
