from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pytest_mistral_lora.chat.rows import parse_row
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.data import Source, convert, import_rows
from pytest_mistral_lora.data.messages import Layout
from pytest_mistral_lora.data.report import CHANGES, LOSSES, Report
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.strategies import rows

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
BARE = TOOL["function"]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(call_id: str, arguments: Any = None) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments or {}}}


def calls(*made: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(made), **more}


def result(call_id: str, content: str = "1", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id, **more}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def sharegpt(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in turns], **more}


GOOD = chat(user("u"), answer("a"))
CALL_TEXT = json.dumps({"name": "f", "arguments": {"x": 1}})

CASES: list[tuple[str, Any, Any, dict[str, str]]] = [
    # name, record, row, kinds of changes ("") and losses ("lost")
    ("a row", GOOD | {"id": 7}, GOOD | {"id": 7}, {}),
    ("sharegpt", sharegpt(("human", "u"), ("gpt", "a")), GOOD, {"roles": ""}),
    ("sharegpt of roles", {"conversations": GOOD["messages"]}, GOOD, {}),
    (
        "sharegpt system and a column",
        sharegpt(("human", "u"), ("gpt", "a"), system="s", source="web"),
        chat({"role": "system", "content": "s"}, *GOOD["messages"], source="web"),
        {"roles": "", "system": ""},
    ),
    (
        "sharegpt tools",
        sharegpt(
            ("human", "u"), ("function_call", CALL_TEXT), ("observation", "1"), ("gpt", "a"), tools=json.dumps([BARE])
        ),
        chat(
            user("u"),
            calls(call("zqzocvkcv", {"x": 1})),
            result("zqzocvkcv"),
            answer("a"),
            tools=[TOOL],
        ),
        {"roles": "", "json-text": "", "call-form": "", "made-ids": "", "tool-form": ""},
    ),
    ("alpaca", {"instruction": "i", "input": "", "output": "a"}, chat(user("i"), answer("a")), {}),
    ("alpaca input", {"instruction": "i", "input": "x", "output": "a"}, chat(user("i\nx"), answer("a")), {"input": ""}),
    (
        "alpaca history",
        {"instruction": "i", "input": None, "output": "a", "history": [["u", "b"]], "system": "s"},
        chat({"role": "system", "content": "s"}, user("u"), answer("b"), user("i"), answer("a")),
        {"history": "", "system": "", "null-keys": ""},
    ),
    ("prompt text", {"prompt": "u", "completion": " a"}, GOOD, {"turns": "", "completion-space": ""}),
    ("question", {"question": "u", "answer": "a"}, GOOD, {"turns": ""}),
    (
        "prompt messages",
        {"prompt": [user("u"), answer("a"), user("v")], "completion": [answer("b")]},
        chat(user("u"), answer("a", weight=0), user("v"), answer("b")),
        {"turns": "", "prompt-weights": ""},
    ),
    ("kto good", {"prompt": "u", "completion": "a", "label": True}, GOOD | {"label": True}, {"turns": ""}),
    ("kto bad", {"prompt": "u", "completion": "a", "label": False}, None, {"turns": "", "unwanted": "lost"}),
    (
        "kto bad in CSV",
        {"prompt": "u", "completion": "a", "label": "False"},
        None,
        {"turns": "", "unwanted": "lost"},
    ),
    ("preference", {"prompt": "u", "chosen": "a", "rejected": "b"}, GOOD, {"chosen": "", "rejected": "lost"}),
    (
        "preference whole",
        {"chosen": GOOD["messages"], "rejected": [user("u"), answer("b")]},
        GOOD,
        {"chosen": "", "rejected": "lost"},
    ),
    (
        "preference with its prompt twice",
        {"prompt": "u", "chosen": GOOD["messages"], "rejected": [user("u"), answer("b")]},
        GOOD,
        {"chosen": "", "rejected": "lost"},
    ),
    (
        "preference of ShareGPT",
        sharegpt(("human", "u"), chosen={"from": "gpt", "value": "a"}, rejected={"from": "gpt", "value": "b"}),
        GOOD,
        {"chosen": "", "rejected": "lost", "roles": ""},
    ),
    (
        "preference of Alpaca",
        {"instruction": "u", "input": "v", "chosen": "a", "rejected": "b"},
        chat(user("u\nv"), answer("a")),
        {"chosen": "", "rejected": "lost", "input": ""},
    ),
    (
        "preference of OpenAI",
        {
            "input": {"messages": [user("u")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [answer("a")],
            "non_preferred_output": [answer("b")],
        },
        GOOD | {"parallel_tool_calls": True},
        {"chosen": "", "rejected": "lost"},
    ),
    (
        "OpenAI ids",
        chat(user("u"), calls(call("call_1"), call("call_2")), result("call_2"), result("call_1"), answer("a")),
        chat(
            user("u"),
            calls(call("oqmw7zzoj"), call("dnupqp5di")),
            result("dnupqp5di"),
            result("oqmw7zzoj"),
            answer("a"),
        ),
        {"call-ids": ""},
    ),
    (
        "OpenAI functions",
        chat(
            user("u"),
            answer(None, function_call={"name": "f", "arguments": "{}"}),
            {"role": "function", "name": "f", "content": "1"},
            answer("a"),
            functions=[BARE],
        ),
        chat(
            user("u"),
            calls({"id": "bb4fw3tx2", "type": "function", "function": {"name": "f", "arguments": "{}"}}, content=None),
            result("bb4fw3tx2", name="f"),
            answer("a"),
            tools=[TOOL],
        ),
        {"function-call": "", "made-ids": "", "call-form": "", "roles": "", "tool-form": ""},
    ),
    (
        "OpenAI developer, refusal and padding",
        chat({"role": "developer", "content": "s"}, user("u"), answer(None, refusal="no", audio=None, tool_calls=[])),
        chat({"role": "system", "content": "s"}, user("u"), answer("no")),
        {"roles": "", "refusals": "", "null-keys": ""},
    ),
    (
        "a tool with `required` beside its parameters",
        GOOD | {"tools": [{"name": "f", "parameters": {"type": "object", "properties": {}}, "required": ["x"]}]},
        GOOD
        | {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"type": "object", "properties": {}, "required": ["x"]}},
                }
            ]
        },
        {"tool-form": ""},
    ),
    (
        "a tool without parameters, and strict",
        GOOD | {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        GOOD
        | {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {}}},
                }
            ]
        },
        {"tool-form": ""},
    ),
    (
        "reasoning",
        chat(user("u"), answer("a", reasoning_content="t", reasoning="t")),
        chat(user("u"), answer([{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}])),
        {"thinking": ""},
    ),
    (
        "flags",
        chat(user("u") | {"train": False}, answer("a", train=False), user("v"), answer("b", loss=1.0)),
        chat(user("u"), answer("a", weight=0), user("v"), answer("b", weight=1)),
        {"weights": ""},
    ),
    ("a mask", chat(user("u"), answer("a", mask=True)), chat(user("u"), answer("a", weight=0)), {"weights": ""}),
    (
        "half a weight",
        chat(user("u"), answer("a", weight=0.5)),
        chat(user("u"), answer("a", weight=1)),
        {"weights": "both"},
    ),
    (
        "a trained prompt",
        chat(user("u") | {"train": True}, answer("a")),
        GOOD,
        {"weights": "", "trained-prompts": "lost"},
    ),
    ("names", chat(user("u") | {"name": "Ann"}, answer("a")), GOOD, {"names": "lost"}),
    ("a key of a message", chat(user("u"), answer("a", id="x")), GOOD, {"message-keys": "lost"}),
    ("images of a row", GOOD | {"images": ["a.png"]}, GOOD, {"media": "lost"}),
    (
        "an image in a message",
        chat(user([{"type": "text", "text": "u"}, {"type": "image_url", "image_url": {"url": "x"}}]), answer("a")),
        chat(user([{"type": "text", "text": "u"}]), answer("a")),
        {"media": "lost", "chunks": ""},
    ),
    ("a last question", chat(user("u"), answer("a"), user("v")), GOOD, {"last-prompt": "lost"}),
    ("a key that is nearly ours", GOOD | {"tool": 1}, GOOD, {"keys": "lost"}),
    (
        "two system prompts",
        chat({"role": "system", "content": "s"}, user("u"), answer("a"), system="t"),
        chat({"role": "system", "content": "s"}, user("u"), answer("a")),
        {"system": "lost"},
    ),
    (
        "LLaMA-Factory v1",
        chat(
            {"role": "user", "content": [{"type": "text", "value": "u"}], "loss_weight": 0.0},
            {
                "role": "assistant",
                "content": [{"type": "reasoning", "value": "t"}, {"type": "tool_call", "value": CALL_TEXT}],
                "loss_weight": 1.0,
            },
            {"role": "tool", "content": [{"type": "text", "value": "1"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "a"}]},
            tools=json.dumps([BARE]),
        ),
        chat(
            user("u"),
            calls(call("zqzocvkcv", {"x": 1}), content=[{"type": "thinking", "thinking": "t"}], weight=1),
            result("zqzocvkcv"),
            answer("a"),
            tools=[TOOL],
        ),
        {"chunks": "", "weights": "", "json-text": "", "made-ids": "", "call-form": "", "tool-form": ""},
    ),
    (
        "mistral-finetune",
        {"interactions": [{"role": "user", "text": "u"}, {"role": "assistant", "text": "a"}], "system_prompt": "s"},
        chat({"role": "system", "content": "s"}, user("u"), answer("a")),
        {"content-key": "", "system": ""},
    ),
    (
        "mistral-finetune only_last",
        chat(user("u"), answer("a"), user("v"), answer("b"), only_last=True),
        chat(user("u"), answer("a", weight=0), user("v"), answer("b")),
        {"only-last": ""},
    ),
    (
        "only_last in CSV",
        chat(user("u"), answer("a"), user("v"), answer("b"), only_last="false"),
        chat(user("u"), answer("a"), user("v"), answer("b")),
        {},
    ),
    ("a list of messages", [user("u"), answer("a")], GOOD, {}),
    (
        "one result for two calls",
        sharegpt(
            ("human", "u"),
            ("function_call", json.dumps([json.loads(CALL_TEXT)] * 2)),
            ("observation", "[1, {}]"),
            ("gpt", "a"),
        ),
        chat(
            user("u"),
            calls(call("zqzocvkcv", {"x": 1}), call("q2o62izxu", {"x": 1})),
            result("zqzocvkcv"),
            result("q2o62izxu", "{}"),
            answer("a"),
        ),
        {"roles": "", "json-text": "", "call-form": "", "made-ids": "", "results-split": ""},
    ),
    (
        "a result that is JSON",
        chat(user("u"), calls(call("abcdefghi")), result("abcdefghi", {"t": 1}), answer("a")),  # type: ignore[arg-type]
        chat(user("u"), calls(call("abcdefghi")), result("abcdefghi", '{"t": 1}'), answer("a")),
        {"result-text": ""},
    ),
]


def converted(path: Path, *, layout: Layout | None = None) -> tuple[list[Any], Report]:
    report = Report()
    return list(convert([Source(path, layout or Layout())], report, lossy=LOSSES)), report


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


@pytest.mark.parametrize(("name", "record", "row", "kinds"), CASES, ids=[case[0] for case in CASES])
def test_a_record_becomes_this_row(tmp_path: Path, name: str, record: Any, row: Any, kinds: dict[str, str]) -> None:
    # a line alone that is a list would be the brackets of the file
    found, report = converted(written(tmp_path / "a.jsonl", *[record] * 2))
    assert report.fault_lines() == []
    assert found == ([] if row is None else [row] * 2)
    assert report.changes.keys() == {kind for kind, lost in kinds.items() if lost != "lost"}
    assert report.losses.keys() == {kind for kind, lost in kinds.items() if lost}
    assert (report.rows, report.dropped) == (2 * (row is not None), 2 * (row is None))
    for one in found[:1]:
        # a row is imported as it is
        again, second = converted(written(tmp_path / "b.jsonl", one))
        assert (again, second.changes, second.losses) == ([one], {}, {})


def test_each_kind_is_seen_in_a_case() -> None:
    seen = {kind for case in CASES for kind in case[3]}
    declared = {"system-dropped", "untrained-roles", "bad-records", "part-weights", "tool-keys", "refusals"}
    assert CHANGES.keys() | LOSSES.keys() == seen | declared


ROWS = rows(tools=None, weights=True, alternating=False, parallel=True, thinking=True, efforts=("none", "high"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
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


BROKEN: list[tuple[str, Any, str]] = [
    (
        "unknown role",
        sharegpt(("human", "u"), ("bot", "a")),
        "conversations[1].from: 'bot'; expected one of system, user",
    ),
    (
        "no role",
        {"conversations": [{"from": "human", "value": "u"}, {"value": "a"}]},
        "conversations[1].from: is missing",
    ),
    (
        "a message that is text",
        {"conversations": [{"from": "human", "value": "u"}, "a"]},
        "conversations[1]: is a string",
    ),
    (
        "no value",
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt"}]},
        "messages[1].content: is missing",
    ),
    (
        "a call that is no JSON",
        sharegpt(("human", "u"), ("function_call", "f(1)"), ("gpt", "a")),
        "conversations[1]: a text that is not valid JSON",
    ),
    (
        "a call without a name",
        sharegpt(("human", "u"), ("function_call", "{}"), ("gpt", "a")),
        "conversations[1]: has no tool call",
    ),
    (
        "a result before a call",
        sharegpt(("human", "u"), ("observation", "1"), ("gpt", "a")),
        "a result of a tool that no call asked for",
    ),
    (
        "one result for two calls",
        sharegpt(("human", "u"), ("function_call", f"[{CALL_TEXT}, {CALL_TEXT}]"), ("observation", "1"), ("gpt", "a")),
        "conversations[2]: one result for 2 calls",
    ),
    (
        "tools that are no JSON",
        sharegpt(("human", "u"), ("gpt", "a"), tools="f(x)"),
        "tools: a text that is not valid JSON",
    ),
    ("no question", sharegpt(("gpt", "a")), "messages: answers without a question"),
    ("no answer", sharegpt(("human", "u"), ("human", "v")), "messages: no assistant message"),
    (
        "flags that contradict",
        chat(user("u"), answer("a", train=True, weight=0)),
        "messages[1]: flags of training that contradict",
    ),
    (
        "a flag that is text",
        chat(user("u"), answer("a", train="yes")),
        "messages[1].train: 'yes'; expected true, false or a number",
    ),
    ("prefix", chat(user("u"), answer("a", prefix=True)), "messages"),
    ("no messages", {"messages": []}, "messages is empty"),
    (
        "arguments that are a list",
        chat(user("u"), calls(call("a", [1])), result("a"), answer("b")),
        "function.arguments: is a list",
    ),
    ("a tool that is text", GOOD | {"tools": ["f"]}, "tools[0]: a text that is not valid JSON"),
    (
        "parameters that are no JSON",
        GOOD | {"tools": [{**BARE, "parameters": "x"}]},
        "tools[0].function.parameters: a text",
    ),
    (
        "an output that is empty",
        {"instruction": "i", "input": "", "output": ""},
        "messages[1].content: an empty answer",
    ),
    ("an output that is a number", {"instruction": "i", "input": "", "output": 3}, "output: is a number"),
    ("an instruction that is a list", {"instruction": ["i"], "input": "", "output": "a"}, "instruction: is a list"),
    (
        "a history of texts",
        {"instruction": "i", "output": "a", "history": ["u", "a"]},
        "history[0]: 'u'; expected a pair",
    ),
    ("a completion that is null", {"prompt": "u", "completion": None}, "completion: is missing; expected a text"),
    ("a completion that is empty", {"prompt": "u", "completion": " "}, "messages[1].content: an empty answer"),
    (
        "a chosen answer without a prompt",
        {"chosen": "a", "rejected": "b"},
        "chosen: a chosen answer without its prompt",
    ),
    ("text", {"text": "[INST] u [/INST] a"}, "this is plain text (text)"),
    ("encoded rows", {"input_ids": [1], "labels": [1]}, "this is encoded rows (input_ids)"),
    ("a message alone", user("u"), "this is a message alone (role). Put all messages of a conversation in a list"),
    ("another object", {"a": 1, "b": 2}, "no known format: keys a, b"),
    ("a number", 3, "no known format: the first record is a number"),
]


@pytest.mark.parametrize(("name", "record", "said"), BROKEN, ids=[case[0] for case in BROKEN])
def test_a_broken_record_is_reported_with_its_field(tmp_path: Path, name: str, record: Any, said: str) -> None:
    path = written(tmp_path / "a.jsonl", record)
    to = tmp_path / "rows.jsonl"
    with pytest.raises(InputError) as caught:
        import_rows([Source(path)], to)
    assert said in str(caught.value)
    assert f"{path}:1" in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_records_of_two_formats_are_an_error_of_the_second(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", sharegpt(("human", "u"), ("gpt", "a")), {"prompt": "u", "completion": "a"})
    _, report = converted(path)
    assert report.fault_lines() == [
        f"{path}:2: this is prompt and completion (`prompt` and `completion` of text); "
        "expected ShareGPT, as the file's first rows are"
    ]


def test_a_loss_is_an_error_until_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"prompt": "u", "chosen": "a", "rejected": "b"}
    path = written(tmp_path / "pairs.jsonl", *[pair] * 5)
    to = tmp_path / "rows.jsonl"
    words = ["import", str(path), "--to", str(to)]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: 5 of 5 records cannot be converted" in err
    places = ", ".join(f"{path}:{number}" for number in (1, 2, 3))
    assert f"the rejected answer of a pair: 5 rows ({places}, …). To leave that out, add --lossy rejected" in err
    assert not to.exists()
    assert main([*words, "--lossy", "rejected"]) == 0
    assert to.read_text("utf-8") == 5 * (json.dumps(GOOD) + "\n")
    assert "lost     rejected" in capsys.readouterr().out
    assert main([*words, "--lossy", "rejected"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["import", str(path), "--to", str(tmp_path / "b"), "--lossy", "all"]) == 2
    assert "--lossy: unknown kind 'all'; expected one of rejected" in capsys.readouterr().err


def test_the_remains_of_a_killed_import_go_and_folders_are_made(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".rows.jsonl.abcdefgh").touch()
    import_rows([Source(path)], tmp_path / "out" / "rows.jsonl")
    import_rows([Source(path)], tmp_path / "new" / "folder" / "rows.jsonl")
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["rows.jsonl"]
    with pytest.raises(InputError, match="cannot be written"):
        import_rows([Source(path)], path / "rows.jsonl")


def test_bad_records_are_left_out_only_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.jsonl", GOOD, {"messages": [{"role": "bot", "content": "x"}]}, GOOD)
    words = ["import", str(path), "--to", str(tmp_path / "rows.jsonl")]
    assert main(words) == 2
    assert "1 of 3 records cannot be converted" in capsys.readouterr().err
    assert main([*words, "--lossy", "bad-records", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["rows"], data["dropped"]) == (2, 1)
    assert data["left_out"][0].startswith(f"{path}:2, messages[0].role: 'bot'")


def test_several_sources_become_one_file_and_the_report_has_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = written(tmp_path / "a.jsonl", sharegpt(("human", "u"), ("gpt", "a")))
    second = tmp_path / "b.json"
    second.write_text(json.dumps([{"instruction": "u", "input": "", "output": "a"}] * 2), "utf-8")
    to = tmp_path / "rows.jsonl"
    assert main(["import", str(first), str(second), "--to", str(to), "--json"]) == 0
    assert to.read_text("utf-8") == 3 * (json.dumps(GOOD) + "\n")
    data = json.loads(capsys.readouterr().out)
    assert [(one["container"], one["format"]) for one in data["sources"]] == [
        ("JSON Lines", "ShareGPT (`conversations` with from/value)"),
        ("a JSON array", "Alpaca (`instruction/input/output`)"),
    ]
    assert data["changes"]["roles"] == {
        "rows": 1,
        "first": [f"{first}:1"],
        "details": {"human is user": 1, "gpt is assistant": 1},
    }


def test_a_named_format_is_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.jsonl", {"instruction": "i", "output": "a", "chosen": "c", "rejected": "r"})
    words = ["import", str(path), "--to", str(tmp_path / "rows.jsonl"), "--format", "alpaca"]
    assert main(words) == 2
    assert "this is preference pairs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["import", str(path), "--to", "x", "--format", "csv"])


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_a_file_without_records_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match="the file has no rows"):
        import_rows([Source(path)], tmp_path / "rows.jsonl")


def test_csv_holds_conversations_as_json(tmp_path: Path) -> None:
    import csv

    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["conversations", "id"])
        writer.writerow([json.dumps(sharegpt(("human", "u"), ("gpt", "a"))["conversations"]), "7"])
    found, report = converted(path)
    assert found == [GOOD | {"id": "7"}]
    assert report.changes.keys() == {"roles", "json-text"}
