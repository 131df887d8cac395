"""Record the packaged goldens from mistral-common: `python scripts/record_goldens.py [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from mistral_common.exceptions import MistralCommonException

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import OracleRejection, counted
from pytest_mistral_lora.records.files import write_json, write_text
from pytest_mistral_lora.records.goldens import (
    Case,
    golden_paths,
    goldens_folder,
    library_versions,
    packaged_cases,
    record,
)

DATA_VERSION = "1.1"
"""Version of the data in goldens/; docs/data.md says when it grows."""
_REFUSALS = goldens_folder() / "refusals.json"


def main() -> int:
    """Rewrite the goldens, or with --check say which would change (exit code 1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a golden would change")
    check = parser.parse_args().check
    changed = []
    for name in SHIPPED:
        changed += _record_tokenizer(name, check=check)
    for name in SHIPPED:
        path = goldens_folder() / "encoded" / f"{name}.json"
        text = encoded_text(recorded_encodings(Oracle(shipped_tokenizer(name))))
        if not path.is_file() or text != path.read_text(encoding="utf-8"):
            changed.append(f"encoded/{name}")
            if not check:
                path.parent.mkdir(exist_ok=True)
                write_text(path, text)
    refusals = recorded_refusals()
    if not _REFUSALS.is_file() or refusals != read_json(_REFUSALS):
        changed.append(_REFUSALS.name)
    if not check:
        write_json(_REFUSALS, refusals)
        _write_provenance()
    print(f"{counted(len(changed), 'golden')} {'would change' if check else 'changed'}")
    return int(check and bool(changed))


def _record_tokenizer(name: str, *, check: bool) -> list[str]:
    tokenizer = CheckpointTokenizer(shipped_tokenizer(name))
    folder = goldens_folder() / "templates" / name
    folder.mkdir(parents=True, exist_ok=True)
    changed = []
    cases = [case for case in packaged_cases() if case.fits(tokenizer.oracle)]
    for case in cases:
        golden = record(case, tokenizer, folder)
        before = golden.path.read_text(encoding="utf-8") if golden.path.is_file() else ""
        if before != golden.text():
            changed.append(f"{name}/{case.name}")
            if not check:
                golden.write()
    for path in set(golden_paths(folder)) - {folder / f"{case.name}.json" for case in cases}:
        changed.append(f"{name}/{path.stem}")
        if not check:
            path.unlink()
    return changed


def recorded_refusals() -> dict[str, dict[str, dict[str, str]]]:
    """Return the cases that each tokenizer refuses: the field, and who refuses it."""
    oracles = {name: Oracle(shipped_tokenizer(name)) for name in SHIPPED}
    return {
        name: {case.name: found for case in packaged_cases() if (found := _refusal(case, oracle))}
        for name, oracle in oracles.items()
    }


def _refusal(case: Case, oracle: Oracle) -> dict[str, str] | None:
    try:
        oracle.encode(parse_row(case.row.to_json()))
    except OracleRejection as error:
        return _refused(case.row.to_json(), error, oracle)
    return None


def _refused(row: dict[str, Any], error: OracleRejection, oracle: Oracle) -> dict[str, str]:
    """Return the field of a row that is refused, and who refuses it."""
    try:
        oracle.reference(row)
    except MistralCommonException:
        return {"at": str(error.place), "by": "mistral-common"}
    return {"at": str(error.place), "by": "pytest-mistral-lora"}


def recorded_encodings(oracle: Oracle) -> dict[str, dict[str, Any]]:
    """Return what a tokenizer makes of the rows of `answers.json` and of `pairs.json`, by file and case."""
    return {name: dict(_encodings(name, oracle)) for name in ("answers", "pairs")}


def _encodings(name: str, oracle: Oracle) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each case of a file with its encoding: of a row, or of each side of a pair."""
    for data in read_json(goldens_folder() / f"{name}.json"):
        sides = {}
        for row in parse_rows(data["row"]):
            try:
                encoded = oracle.encode(row)
            except OracleRejection as error:
                sides[row.side or "row"] = {"refusal": _refused(row.to_json(), error, oracle)}
            else:
                sides[row.side or "row"] = {"input_ids": encoded.input_ids, "labels": encoded.labels}
        yield data["case"], sides.get("row", sides)


def encoded_text(encodings: dict[str, dict[str, Any]]) -> str:
    """Return the text of a file of encodings; each case is one line, so that a diff shows the change."""
    files = [
        f"{json.dumps(name)}: {{\n    "
        + ",\n    ".join(f"{json.dumps(case)}: {json.dumps(encoding)}" for case, encoding in cases.items())
        + "\n  }"
        for name, cases in encodings.items()
    ]
    return "{\n  " + ",\n  ".join(files) + "\n}\n"


def _write_provenance() -> None:
    tokenizers = {
        name: {
            "file": shipped_tokenizer(name).name,
            "sha256": CheckpointTokenizer(shipped_tokenizer(name)).oracle.sha256,
        }
        for name in SHIPPED
    }
    data = {
        "data_version": DATA_VERSION,
        "recorded_by": "scripts/record_goldens.py",
        "source": "The tokenizer files that mistral-common ships; rows written for this project (goldens/cases.json).",
        "licence": "Apache-2.0",
        "recorded_with": library_versions(),
        "tokenizers": tokenizers,
    }
    write_json(goldens_folder() / "provenance.json", data)


if __name__ == "__main__":
    sys.exit(main())
