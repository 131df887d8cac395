"""Records of every form become the rows that they mean, and each change and loss is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from imported import (
    BARE,
    CALL_TEXT,
    GOOD,
    TOOL,
    answer,
    call,
    calls,
    chat,
    converted,
    result,
    sharegpt,
    user,
    written,
)

from pytest_mistral_lora.formats.report import CHANGES, LOSSES

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
    ("alpaca input alone", {"instruction": "", "input": "x", "output": "a"}, chat(user("x"), answer("a")), {}),
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
        "a mask of the loss",
        chat(user("u"), answer("a", loss_mask=0), user("v"), answer("b", loss_mask=1)),
        chat(user("u"), answer("a", weight=0), user("v"), answer("b", weight=1)),
        {"weights": ""},
    ),
    (
        "a flag in a prompt gives nothing back",
        {"prompt": [user("u"), answer("a", train=True), user("v")], "completion": [answer("b", train=True)]},
        chat(user("u"), answer("a", weight=0), user("v"), answer("b", weight=1)),
        {"turns": "", "weights": "", "prompt-weights": ""},
    ),
    (
        "a result of a tool in a completion",
        {
            "prompt": [user("u")],
            "completion": [calls(call("zqzocvkcv", {"x": 1})), result("zqzocvkcv"), answer("a")],
            "tools": [TOOL],
        },
        chat(user("u"), calls(call("zqzocvkcv", {"x": 1})), result("zqzocvkcv"), answer("a"), tools=[TOOL]),
        {"turns": ""},
    ),
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
    ("audio of a row", GOOD | {"audios": ["a.wav"]}, GOOD, {"media": "lost"}),
    (
        "audio in a message",
        chat(user([{"type": "text", "text": "u"}, {"type": "input_audio", "input_audio": "x"}]), answer("a")),
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
        "mistral-finetune with tools",
        {"interactions": [user("u"), answer("a"), user("v"), answer("b")], "tools": [TOOL]},
        chat(user("u"), answer("a", weight=0), user("v"), answer("b"), tools=[TOOL]),
        {"tools-last": ""},
    ),
    (
        "mistral-finetune's own key of tools",
        chat(user("u"), answer("a", weight=1), user("v"), answer("b"), available_tools=[TOOL]),
        chat(user("u"), answer("a", weight=0), user("v"), answer("b"), tools=[TOOL]),
        {"tools-last": ""},
    ),
    (
        "only_last is false, and there are tools",
        chat(user("u"), answer("a"), user("v"), answer("b"), tools=[TOOL], only_last=False),
        chat(user("u"), answer("a", weight=0), user("v"), answer("b"), tools=[TOOL]),
        {"tools-last": ""},
    ),
    (
        "the tools of another program",
        chat(user("u"), answer("a"), user("v"), answer("b"), tools=[TOOL]),
        chat(user("u"), answer("a"), user("v"), answer("b"), tools=[TOOL]),
        {},
    ),
    (
        "no tools under the keys of mistral-finetune",
        {"interactions": [user("u"), answer("a"), user("v"), answer("b")], "available_tools": []},
        chat(user("u"), answer("a"), user("v"), answer("b")),
        {},
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
        chat(user("u"), calls(call("abcdefghi")), result("abcdefghi", {"t": 1}), answer("a")),
        chat(user("u"), calls(call("abcdefghi")), result("abcdefghi", '{"t": 1}'), answer("a")),
        {"result-text": ""},
    ),
]


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
    # these are seen in test_declared_layouts.py, test_no_silent_loss.py, test_kinds_of_rows.py and
    # test_imported_pairs.py and test_pictures.py
    elsewhere = {"system-dropped", "untrained-roles", "bad-records", "part-weights", "tool-keys", "refusals"}
    elsewhere |= {
        "call-text",
        "result-chunks",
        "pair",
        "rated",
        "best-worst",
        "chosen-copy",
        "fim-keys",
        "label-letters",
        "pictures",
    }
    assert CHANGES.keys() | LOSSES.keys() == seen | elsewhere
