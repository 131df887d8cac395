"""Rows of other makers: Anthropic's tools, Gemini's parts, calls in letters, bad answers, and what has no turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from imported import USER, answer, call, calls, chat, result, sharegpt, user

from pytest_mistral_lora import judge
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.convert import Source, convert
from pytest_mistral_lora.formats.report import Report

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}


def converted(folder: Path, *records: dict[str, Any], lossy: tuple[str, ...] = ()) -> tuple[list[Any], Report]:
    """Return what becomes of records: rows, or their errors, and the report."""
    path = folder / "records.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), "utf-8")
    report = Report()
    return list(convert([Source(path)], report, lossy=lossy)), report


def test_the_schema_of_anthropic_s_tool_is_its_parameters(tmp_path: Path) -> None:
    tool = {"name": "f", "description": "d", "input_schema": SCHEMA}
    [row], report = converted(tmp_path, chat(USER, answer("a"), tools=[tool]))
    assert row["tools"] == [TOOL]
    assert not report.losses


def test_a_schema_beside_parameters_is_a_loss(tmp_path: Path) -> None:
    tool = {"name": "f", "description": "d", "parameters": SCHEMA, "input_schema": {"type": "object"}}
    rows, report = converted(tmp_path, chat(USER, answer("a"), tools=[tool]))
    assert not rows
    assert report.losses["tool-keys"].details == {"input_schema": 1}


def test_anthropic_s_calls_and_results_are_messages(tmp_path: Path) -> None:
    uses = [{"type": "tool_use", "id": f"toolu_{number}", "name": "f", "input": {"x": number}} for number in (1, 2)]
    results = [
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "two"},
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "one"}]},
        {"type": "text", "text": "And now?"},
    ]
    record = chat(USER, answer([{"type": "text", "text": "So:"}, *uses]), user(results), answer("Done."))
    [row], report = converted(tmp_path, record)
    asked = row["messages"][1]["tool_calls"]
    assert row["messages"] == [
        USER,
        answer(
            [{"type": "text", "text": "So:"}],
            tool_calls=[call(asked[0]["id"], {"x": 1}), call(asked[1]["id"], {"x": 2})],
        ),
        result(asked[1]["id"], "two"),
        result(asked[0]["id"], [{"type": "text", "text": "one"}]),
        user([{"type": "text", "text": "And now?"}]),
        answer("Done."),
    ]
    assert not report.losses
    assert "result-chunks" in report.changes


def test_the_failure_of_a_tool_is_no_part_of_its_result(tmp_path: Path) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}
    failed = {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True, "content": "no"}
    rows, report = converted(tmp_path, chat(USER, answer([use]), user([failed]), answer("Sorry.")))
    assert not rows
    assert report.losses["message-keys"].details == {"is_error": 1}


@pytest.mark.parametrize(
    ("answered", "rules"), [("uvw1x2y3z", set()), ("zzzzzzzzz", {"ML621"}), ("toolu_9", {"ML621"})]
)
def test_a_result_of_no_call_stays_one(answered: str, rules: set[str], tmp_path: Path) -> None:
    use = {"type": "tool_use", "id": "uvw1x2y3z", "name": "f", "input": {"x": 1}}
    given = {"type": "tool_result", "tool_use_id": answered, "content": "one"}
    record = chat(USER, answer([use]), user([given]), answer("Done."), tools=[TOOL])
    rows, report = converted(tmp_path, record)
    # an id without nine letters and digits would be replaced: the import refuses the record with its own id
    assert [row["messages"][2]["tool_call_id"] for row in rows] == [answered] * (answered != "toolu_9")
    assert report.bad == (answered == "toolu_9")
    for name, written in (("before", record), *(("after", row) for row in rows)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(written), "utf-8")
        findings = judge(path, tokenizer="spm-v2").findings
        assert {finding.rule for finding in findings} == rules
        assert {str(finding.place.within()) for finding in findings} <= {f"{path}:1, messages[2].tool_call_id"}


HERMES = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_calls_in_letters_are_calls(tmp_path: Path) -> None:
    turns = [
        ("human", "u"),
        ("gpt", f"So:\n{HERMES}"),
        ("tool", "<tool_response>\n1\n</tool_response>"),
        ("gpt", "One."),
    ]
    [row], report = converted(tmp_path, sharegpt(*turns))
    [asked] = row["messages"][1]["tool_calls"]
    assert row["messages"] == [
        USER,
        calls(call(asked["id"], {"x": 1}), content="So:"),
        result(asked["id"], "1"),
        answer("One."),
    ]
    assert "call-text" in report.changes


@pytest.mark.parametrize(
    "text",
    [
        "Qwen writes <tool_call> and </tool_call>.",
        "<tool_call>{broken</tool_call>",
        '<tool_call>{"name": "f"}</tool_call>',
        f'{HERMES}<tool_call>{{"name": 1, "arguments": {{}}}}</tool_call>',
    ],
)
def test_letters_that_are_no_call_stay(text: str, tmp_path: Path) -> None:
    [row], report = converted(tmp_path, chat(USER, answer(text)))
    assert row["messages"][1] == answer(text)
    assert not report.changes


def test_gemini_s_contents_are_messages(tmp_path: Path) -> None:
    contents = [{"role": "user", "parts": [{"text": "u"}]}, {"role": "model", "parts": [{"text": "a"}]}]
    record = {"systemInstruction": {"parts": [{"text": "s"}]}, "contents": contents}
    [row], _ = converted(tmp_path, record)
    texts = [[{"type": "text", "text": "u"}], [{"type": "text", "text": "a"}]]
    assert row["messages"] == [{"role": "system", "content": "s"}, user(texts[0]), answer(texts[1])]
    _, report = converted(tmp_path, {**record, "systemInstruction": {"parts": [{"inlineData": {}}]}})
    [line] = report.fault_lines()
    assert "system: is an object; expected a string" in line


@pytest.mark.parametrize("prompt", ["prompt", "question"])
@pytest.mark.parametrize("completion", ["completion", "response", "answer"])
def test_every_pair_of_names_is_a_prompt_and_its_answer(prompt: str, completion: str, tmp_path: Path) -> None:
    [row], _ = converted(tmp_path, {prompt: "u", completion: "a"})
    assert row == chat(USER, answer("a"))


BAD = [
    ("reward", 0.0),
    ("reward", -1),
    ("advantage", -0.1),
    ("is_correct", False),
    ("is_correct", "false"),
    ("rating", "bad"),
    ("finish_reason", "length"),
    ("stop_reason", "max_tokens"),
    ("is_truncated", True),
]
GOOD = [("reward", 0.5), ("advantage", 0.0), ("is_correct", True), ("rating", "good"), ("rating", 1), ("reward", "0")]
GOOD += [("finish_reason", "stop"), ("is_truncated", False), ("score", -1)]


@pytest.mark.parametrize(("key", "value"), BAD)
@pytest.mark.parametrize("record", [chat(USER, answer("a")), {"prompt": "u", "completion": "a"}], ids=["chat", "pair"])
def test_an_answer_that_is_marked_as_bad_is_no_row(
    record: dict[str, Any], key: str, value: Any, tmp_path: Path
) -> None:
    _, report = converted(tmp_path, {**record, key: value})
    assert report.losses["unwanted"].details == {key: 1}
    rows, report = converted(tmp_path, {**record, key: value}, record, lossy=("unwanted",))
    assert (len(rows), report.dropped) == (1, 1)


@pytest.mark.parametrize(("key", "value"), GOOD)
def test_an_answer_that_is_not_marked_as_bad_is_kept_with_its_mark(key: str, value: Any, tmp_path: Path) -> None:
    [row], _ = converted(tmp_path, chat(USER, answer("a"), **{key: value}))
    assert row[key] == value


def labels(tmp_path: Path, key: str, *values: Any, of: Any = None) -> list[Any]:
    """Return the label of each converted row, None for a conversation; or the field of each fault."""
    record = of or {"prompt": "u", "completion": "a"}
    rows, report = converted(tmp_path, *({**record, key: value} for value in values))
    return report.fault_lines() or [row.get("label") if "completion" in row else None for row in rows]


@pytest.mark.parametrize("of", [None, chat(USER, answer("a"))], ids=["texts", "messages"])
@pytest.mark.parametrize("key", ["label", "kto_tag", "score", "reward"])
@pytest.mark.parametrize("values", [(1, -1), (-1.0, 1.0), ("1", "-1")], ids=str)
def test_a_column_of_one_and_minus_one_marks_its_answers(tmp_path: Path, key: str, values: Any, of: Any) -> None:
    good = [float(value) > 0 for value in values]
    assert labels(tmp_path, key, *values, of=of) == good
    # the first records do not tell it
    assert labels(tmp_path, key, *[values[good.index(True)]] * 30, -1, of=of)[-2:] == [True, False]


@pytest.mark.parametrize("values", [(1, 0, -1), (0, 1, 2), (-1, -1), ("1", "-1", "x")], ids=str)
def test_a_column_with_other_values_marks_no_answer(tmp_path: Path, values: Any) -> None:
    assert labels(tmp_path, "label", *values) == [None] * len(values)


def test_a_label_that_is_none_among_marks_is_an_error(tmp_path: Path) -> None:
    [fault] = labels(tmp_path, "label", True, -1, False)
    assert "records.jsonl:2, label: -1; expected true or false" in fault


GAP = {"prompt": "def f():", "suffix": "# end", "completion": "return 1"}


@pytest.mark.parametrize("completion", ["completion", "middle", "response"])
def test_fill_in_the_middle_keeps_its_three_texts(completion: str, tmp_path: Path) -> None:
    record = {"prompt": "def f():", "suffix": "# end", completion: "return 1", "id": 7}
    rows, report = converted(tmp_path, record)
    assert rows == [{**GAP, "id": 7}]
    assert report.changes.keys() == ({"fim-keys"} if completion != "completion" else set())
    assert list(report.own_keys.details) == ["id"]
    assert not report.losses


def test_prefix_suffix_and_middle_are_fill_in_the_middle(tmp_path: Path) -> None:
    rows, report = converted(tmp_path, {"prefix": "def f():", "suffix": "", "middle": "return 1"})
    assert rows == [{**GAP, "suffix": ""}]
    assert report.changes["fim-keys"].details == {"prefix is prompt": 1, "middle is completion": 1}


def test_a_record_without_the_suffix_of_the_others_is_no_conversation(tmp_path: Path) -> None:
    rows, report = converted(tmp_path, GAP, {**GAP, "suffix": None})
    assert rows == [GAP]
    assert "this is prompt and completion" in report.fault_lines()[0]


def test_a_completion_that_is_marked_as_bad_is_a_loss(tmp_path: Path) -> None:
    rows, report = converted(tmp_path, {**GAP, "is_correct": False})
    assert not rows
    assert report.losses.keys() == {"unwanted"}


@pytest.mark.parametrize(
    ("record", "title", "step"),
    [
        ({"prompt": "a", "suffix": "c"}, "fill-in-the-middle without a completion", "under `completion`"),
        ({"prompt": [USER], "suffix": "c", "completion": "b"}, "fill-in-the-middle without", "all three are texts"),
        (chat(USER, answer("a"), suffix="c"), "a row with a suffix", "write it into a message"),
        (
            {"prompt": "a", "responses": ["b", "c"], "votes": [1, 0]},
            "several answers",
            "under `chosen` and `rejected`",
        ),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [1, 0]}, "several answers", "Choose one of them"),
        ({"message_tree_id": "1", "prompt": {"text": "a", "replies": []}}, "a tree of messages", "Write each path"),
        ({"source": "a", "conversation": [{"input": "a", "output": "b"}]}, "in Capybara", "as two messages"),
        ({"id": 1, "query": "a", "tools": "[]", "answers": "[]"}, "in xLAM", "`tool_calls`"),
        ({"context": "a", "question": "b", "answers": {"text": ["a"], "answer_start": [0]}}, "in SQuAD", "`context`"),
        ({"title": "a", "paragraphs": [{"context": "a", "qas": []}]}, "in SQuAD", "each of `qas`"),
    ],
    ids=["no completion", "no text", "suffix", "votes", "steps", "tree", "Capybara", "xLAM", "SQuAD", "an article"],
)
def test_what_has_no_turns_is_named_with_the_way_out(
    record: dict[str, Any], title: str, step: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=title) as caught:
        converted(tmp_path, record)
    assert step in str(caught.value)


def test_an_error_names_eight_keys(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keys 0, 1, 2, 3, 4, 5, 6, 7, and 7160 more"):
        converted(tmp_path, {str(number): 1 for number in range(7168)})


def test_a_list_of_texts_is_no_list_of_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keys data") as caught:
        converted(tmp_path, {"data": ["a", "b"]})
    assert "jq" not in str(caught.value)
    with pytest.raises(InputError, match="jq"):
        converted(tmp_path, {"data": [{"a": "b"}]})
