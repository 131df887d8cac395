"""Generated rows, the padding of tables and the ids of calls: rows come back as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imported import (
    BARE,
    TOOL,
    answer,
    call,
    calls,
    chat,
    converted,
    result,
    user,
    written,
)
from pyarrow import parquet

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.strategies import rows

ROWS = rows(tools=None, weights=True, alternating=False, parallel=True, thinking=True, efforts=("none", "high"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(st.lists(ROWS, min_size=1, max_size=3))
def test_a_row_is_imported_as_it_is(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    found, report = converted(written(tmp_path / "a.jsonl", *data))
    assert found == data
    assert (report.changes, report.losses, report.faults) == ({}, {}, {})


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without what a table pads: the keys whose value is null, or a call's empty content."""
    return json.loads(
        json.dumps(row), object_hook=lambda one: {key: value for key, value in one.items() if value is not None}
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(st.lists(rows(tools=True, weights=True, parallel=True), min_size=1, max_size=3))
def test_the_padding_of_a_table_is_removed(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    # arguments and parameters as text, since a table has one type for each column
    for row in data:
        row["tools"] = json.dumps(row["tools"])
        for message in row["messages"]:
            for made in message.get("tool_calls", ()):
                made["function"]["arguments"] = json.dumps(made["function"]["arguments"])
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(data), path)
    found, report = converted(path)
    assert report.faults == {}
    assert [plain(row) for row in found] == [plain(row | {"tools": json.loads(row["tools"])}) for row in data]
    for row in found:
        parse_row(row)


def test_arrow_pads_arguments_and_schemas_and_the_import_removes_it(tmp_path: Path) -> None:
    one = chat(user("u"), calls(call("abcdefghi", {"city": "x"})), result("abcdefghi"), answer("a"), tools=[TOOL])
    other = chat(
        user("u"),
        calls(call("abcdefghi", {"day": 1})),
        result("abcdefghi"),
        answer("a"),
        tools=[
            {
                "type": "function",
                "function": {**BARE, "parameters": {"type": "object", "properties": {"day": {"type": "integer"}}}},
            }
        ],
    )
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([one, other]), path)
    padded = parquet.read_table(path).to_pylist()
    assert padded[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "x", "day": None}
    found, report = converted(path)
    assert found == [one, other]
    assert report.changes["null-keys"].count == 2
    # the same table as JSON
    found, report = converted(written(tmp_path / "a.jsonl", *padded))
    assert found == [one, other]


def test_ids_are_stable_and_never_fall_together(tmp_path: Path) -> None:
    many = [f"call_{number}" for number in range(300)]
    row = chat(user("u"), calls(*map(call, many)), *map(result, many), answer("a"))
    first, _ = converted(written(tmp_path / "a.jsonl", row, row))
    ids = [made["id"] for made in first[0]["messages"][1]["tool_calls"]]
    assert len(set(ids)) == 300
    assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in ids)
    assert [message["tool_call_id"] for message in first[0]["messages"][2:-1]] == ids
    assert first[0] == first[1]
    # an id that is fine stays, and another does not become it
    mixed = chat(user("u"), calls(call("call_1"), call(ids[1])), result("call_1"), result(ids[1]), answer("a"))
    found, _ = converted(written(tmp_path / "b.jsonl", mixed))
    made = [one["id"] for one in found[0]["messages"][1]["tool_calls"]]
    assert made[1] == ids[1]
    assert made[0] != made[1]
