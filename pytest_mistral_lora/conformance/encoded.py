"""Rows as a trainer encoded them, against mistral-common: ids, labels and control tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.jsonl import scan_jsonl
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.difference import show_difference
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.targets import EncodedTarget
from pytest_mistral_lora.errors import RowError, RowsError


def checks(target: EncodedTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of an encoded-rows file."""
    yield Check(target, "encoded", "rows", lambda: Result(tuple(file_findings(target.file, target.oracle))))


def encoded_findings(row: Row, input_ids: Sequence[int], labels: Sequence[int], oracle: Oracle) -> Iterator[Finding]:
    """Yield what is wrong with a row's ids, or else with its labels.

    Args:
        row: The chat row.
        input_ids: The trainer's ids.
        labels: The trainer's labels.
        oracle: Mistral's own tokenization.
    """
    expected = oracle.encode(row)
    if len(labels) != len(input_ids):
        yield Finding("ML101", f"{len(labels)} labels for {len(input_ids)} tokens", row.place, row=row.to_jsonl())
        return
    detail = show_difference((expected.input_ids, expected.labels), (input_ids, labels), oracle.piece)
    if tuple(input_ids) != expected.input_ids:
        yield Finding("ML004", "the ids are not mistral-common's", row.place, detail=detail, row=row.to_jsonl())
    elif tuple(labels) != expected.labels:
        yield Finding("ML103", "the labels are not the assistant's", row.place, detail=detail, row=row.to_jsonl())


def injection_findings(row: Row, input_ids: Sequence[int], oracle: Oracle) -> Iterator[Finding]:
    """Yield one finding for each control token that is there more or less often than the structure needs."""
    controls = oracle.control_tokens
    needed = Counter(token for token in oracle.encode(row).input_ids if token in controls)
    found = Counter(token for token in input_ids if token in controls)
    for token in sorted(needed | found):
        if needed[token] != found[token]:
            what = f"{controls[token]} (id {token}) {found[token]} times"
            yield Finding("ML106", what, row.place, f"{needed[token]} times", row=row.to_jsonl())


def file_findings(path: Path, oracle: Oracle) -> Iterator[Finding]:
    """Yield the findings of every row of an encoded-rows file.

    Raises:
        RowsError: After the last row, if lines are not encoded rows.
        InputError: If the file cannot be opened.
    """
    errors: list[RowError] = []
    count = 0
    for item in scan_jsonl(path):
        count += 1
        try:
            if isinstance(item, RowError):
                raise item
            line, data = item
            place = f"{path}:{line}"
            row = parse_row(data, place=place)
            yield from encoded_findings(row, _ids(data, "input_ids", place), _ids(data, "labels", place), oracle)
        except RowError as error:
            errors.append(error)
    if not count:
        errors.append(RowError("the file has no rows", place=str(path)))
    if errors:
        raise RowsError(errors, place=str(path))


def _ids(data: Any, key: str, place: str) -> list[int]:
    ids = data.get(key)
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        found = "is missing" if ids is None else "holds something else"
        raise RowError(found, place=f"{place}, {key}", expected="a list of integers")
    return ids
