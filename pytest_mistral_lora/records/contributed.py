"""Goldens of tokenizer files that mistral-common does not ship: the packaged rows, recorded by an owner of the file.

A set is a folder `contributed/<first digits of the file's SHA-256>`: a golden for each packaged row that the file can
encode, and `provenance.json`. It is used for a file with that SHA-256 and for no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import Written, json_text, put_text
from pytest_mistral_lora.records.goldens import (
    SCHEMA_VERSION,
    Golden,
    goldens_folder,
    library_versions,
    load,
    packaged_cases,
    record,
)
from pytest_mistral_lora.records.schema import RecordSchema, require_valid

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

CONTRIBUTED = "contributed"
PROVENANCE = "provenance.json"
_SCHEMA = RecordSchema(goldens_folder() / "contributed.schema.json")
_REFERENCE = "MistralTokenizer.encode_chat_completion"
_FILLER = re.compile(r"<SPECIAL_\d+>|\[control_\d+\]")


@dataclass(frozen=True, slots=True)
class ContributedSet:
    """The goldens of one tokenizer file.

    Attributes:
        folder: The folder of the set.
        source: The repository and the commit that the file was published in; None if they are not known.
        goldens: The goldens, by the name of the case.
    """

    folder: Path
    source: Mapping[str, str] | None
    goldens: Mapping[str, Golden]

    @property
    def text(self) -> str:
        """The origin of the set, for people."""
        origin = "a file of unknown origin" if self.source is None else "{repository} {revision}".format(**self.source)
        return f"{len(self.goldens)} rows of {self.folder}, recorded from {origin}"


def set_folder(folder: Path, sha256: str) -> Path:
    """Return the folder of a set within a folder of goldens."""
    return folder / CONTRIBUTED / sha256[:16]


@cache
def find_set(sha256: str, folders: Sequence[Path] = ()) -> ContributedSet | InputError | None:
    """Return the packaged set of a tokenizer file, or else the user's; None if neither exists.

    For a set that cannot be used, the error is returned, so that every check that needs the set can go on.
    """
    for folder in (goldens_folder(), *folders):
        if set_folder(folder, sha256).is_dir():
            try:
                return read_set(set_folder(folder, sha256), sha256)
            except InputError as error:
                return error
    return None


def read_set(folder: Path, sha256: str | None = None) -> ContributedSet:
    """Read a set, and check it: no golden may be of another file, of another row, or edited by hand.

    Args:
        folder: The folder of the set.
        sha256: The SHA-256 that its tokenizer file must have; by default, the one that it states.

    Raises:
        InputError: If the set cannot be used.
    """
    file = folder / PROVENANCE
    data = _read_provenance(file)
    tokenizer = data["tokenizer"]
    if folder.name != tokenizer["sha256"][:16] or tokenizer["sha256"] != (sha256 or tokenizer["sha256"]):
        raise InputError(
            f"it is of a tokenizer file {tokenizer['sha256']}", place=str(file), expected=sha256 or folder.name
        )
    rows, goldens = {case.name: case.row for case in packaged_cases()}, {}
    again = "the file as it was recorded: record the set again, or take it from where it was contributed"
    for name, digest in data["cases"].items():
        path = folder / f"{name}.json"
        golden = load(path)
        if sha256_file(path) != digest:
            raise InputError("it is not the file that provenance.json names", place=str(path), expected=again)
        if golden.tokenizer != tokenizer:
            raise InputError("it is of another tokenizer file than provenance.json", place=str(path), expected=again)
        # a row that has changed since is judged by the target's oracle
        if rows.get(name) == golden.row:
            goldens[name] = golden
    return ContributedSet(folder, data["source"], goldens)


def _read_provenance(file: Path) -> Mapping[str, Any]:
    data: Mapping[str, Any] = read_json(file)
    require_valid(_SCHEMA.violations(data), "provenance of contributed goldens", file)
    return data


def record_set(oracle: Oracle, folder: Path, source: tuple[str, str] | None) -> tuple[Path, Written]:
    """Record the packaged rows for a tokenizer file.

    Args:
        oracle: The tokenizer.
        folder: The folder of goldens in which the set is made.
        source: The repository and the commit of the file, if they are known; else the recorded ones are kept.

    Returns:
        The folder of the set, and whether it was created, rewritten or left unchanged.

    Raises:
        OracleRejection: If mistral-common refuses a row.
        MistralLoraError: If no named deviation explains a difference of the generated template.
        InputError: If a row's ids differ from those of mistral-common's own interface, or the set cannot be written.
    """
    home = set_folder(folder, oracle.sha256)
    file = home / PROVENANCE
    before = _read_provenance(file) if file.exists() else {}
    # the template that mistral-common generates, as for the packaged goldens, not a folder's template
    tokenizer = CheckpointTokenizer(oracle.path)
    states: set[Written] = set()
    digests = {}
    for case in packaged_cases():
        if case.fits(oracle):
            golden = record(case, tokenizer, home)
            if oracle.reference(case.row) != golden.encoded.input_ids:
                raise InputError(f"{case.name} has other ids than {_REFERENCE} gives", place=str(oracle.path))
            states.add(golden.put(load(golden.path) if golden.path.exists() else None))
            digests[case.name] = sha256_file(golden.path)
    known = {"repository": source[0], "revision": source[1]} if source else before.get("source")
    data = _provenance(oracle, known, digests)
    same = {**before, "recorded_with": data["recorded_with"]} == data
    states.add(put_text(file, json_text(data), keep=same))
    return home, states.pop() if len(states) == 1 else "rewritten"


def _provenance(oracle: Oracle, source: Any, digests: Mapping[str, str]) -> dict[str, Any]:
    markers = {str(token): name for token, name in oracle.control_tokens.items() if not _FILLER.fullmatch(name)}
    features = oracle.features
    return {
        "schema_version": SCHEMA_VERSION,
        "tokenizer": {"file": oracle.path.name, "version": oracle.version, "sha256": oracle.sha256},
        "source": source,
        "vocabulary": {
            "size": oracle.vocab_size,
            "control_tokens": markers,
            "thinking": features.thinking,
            "efforts": list(features.efforts),
            "schemas": features.schemas,
        },
        "recorded_with": library_versions(),
        "reference": _REFERENCE,
        "cases": dict(digests),
    }
