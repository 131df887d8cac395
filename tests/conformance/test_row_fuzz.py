"""Damaged rows and encoded rows end in findings or in an error that names the line, and never in a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.likeness import row_likeness
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.row_files import scan_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.dataset.row_findings import call_findings
from pytest_mistral_lora.conformance.dataset.texts import sign_findings
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.places import Place

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": None}}}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": ["string", "null"]}}}
ROW: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Caf\\u00e9?\\nYes"}]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": "1"},
        {"role": "assistant", "content": "<think>One.</think>", "weight": 1},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "", "parameters": SCHEMA}}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    "reasoning_effort": None,
}
ODD = st.one_of(
    st.none() | st.booleans() | st.integers(-3, 4) | st.sampled_from([10**30, -(10**30), 2**63, 1e300, 0.5]),
    st.sampled_from(
        [
            "",
            " ",
            "\\u00e9",
            "\ud800",
            "\x00",
            "{",
            "[]",
            '{"a": NaN}',
            '{"a": 1, "a": 2}',
            "f",
            "a" * 999,
            "<|im_start|>",
        ]
    ),
    st.sampled_from([[], {}, [[]], [{}], {"a": {}}, {"type": "object"}, {"$ref": "#"}, [None], {"": None}]),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def damaged(data: st.DataObject, sound: dict[str, Any]) -> Any:
    """The sound value with one to three of its parts replaced, removed or doubled."""
    value: Any = copy.deepcopy(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from([place for place in places(value) if place] or [("messages",)]))
        parent = value
        for step in path:
            parent = parent[step]
        if not isinstance(parent, dict | list):
            continue
        kind = data.draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if kind == "replace" or (last not in range(len(parent)) and isinstance(parent, list)):
            parent[last] = copy.deepcopy(data.draw(ODD))
        elif kind == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[data.draw(st.sampled_from(["", "rôle", "content", "schema"]))] = parent.pop(last)
    return value


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


@FEW
@given(st.data())
def test_a_damaged_row_is_judged_or_refused_by_name(oracle: Oracle, data: st.DataObject) -> None:
    try:
        row = parse_row(damaged(data, ROW), place=Place.of("rows.jsonl", 1))
        oracle.encode(row)
    except RowError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert refused.startswith("rows.jsonl:1")
        return
    assert row == parse_row(json.loads(row.to_jsonl()))
    for finding in (*call_findings(row), *(sign for _, sign in sign_findings(row, thinks=True) if sign)):
        assert str(finding.place).startswith("rows.jsonl:1")
        assert finding.text()
    assert len(row_likeness(row)) == 16


def encoded_lines(oracle: Oracle) -> list[dict[str, Any]]:
    row = {key: value for key, value in ROW.items() if key in ("messages", "tools")}
    encoded = oracle.encode(row)
    ids, labels = list(encoded.input_ids), list(encoded.labels or ())
    one = {"row": 0, **row, "input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
    two = {
        "row": 1,
        "conversations": [row, row["messages"]],
        "tools": row["tools"],
        "input_ids": ids * 2,
        "labels": labels * 2,
        "position_ids": [*range(len(ids)), *range(len(ids))],
        "attention_mask": [1] * len(ids) + [2] * len(ids),
    }
    return [one, two]


@FEW
@given(st.data())
def test_a_damaged_encoded_row_is_judged_or_unreadable(
    oracle: Oracle, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lines = [damaged(data, line) for line in encoded_lines(oracle)]
    text = b"\n".join(json.dumps(line).encode() for line in lines)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + data.draw(st.binary(max_size=3)) + text[at + data.draw(st.integers(0, 3)) :]
    file = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    file.write_bytes(text)
    source = tmp_path_factory.getbasetemp() / "source.jsonl"
    source.write_text(json.dumps({key: ROW[key] for key in ("messages", "tools")}) + "\n")
    for dataset in ((), (source,)):
        audit = Audit(FileRows(file), oracle, dataset)
        # bytes that begin like another format, such as UTF-16, are refused as a whole
        with suppress(InputError):
            for verdict in audit.verdicts():
                for finding in verdict.findings:
                    # a fault of a text is in the row of the dataset, if the line has ids alone
                    assert finding.place.source.name in {str(file), *map(str, dataset)}
                    assert finding.text()
        json.dumps(audit.summary())


@FEW
@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_bytes_are_rows_or_errors(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int) -> None:
    text = json.dumps(ROW).encode()
    file: Path = tmp_path_factory.getbasetemp() / "noise.jsonl"
    file.write_bytes(text[:at] + noise + text[at:] + b"\n" + text)
    try:
        found = list(scan_rows(file))
    except InputError as error:
        found = [RowError(error.found, place=str(error.place))]
    else:
        assert isinstance(found[-1], Row)
    assert all(isinstance(one, Row | RowError) for one in found)
