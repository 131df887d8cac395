"""An import refuses what it cannot convert, by file, line and field, and writes one whole file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from imported import BARE, CALL_TEXT, GOOD, answer, call, calls, chat, converted, result, sharegpt, user, written

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats import convert
from pytest_mistral_lora.formats.convert import Source, import_rows

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
    (
        "an instruction that is empty",
        {"instruction": "", "input": " ", "output": "a"},
        "instruction: is empty; expected a text or messages",
    ),
    (
        "a last instruction that is empty",
        {"instruction": "", "output": "a", "history": [["u", "b"]]},
        "instruction: is empty; expected a text or messages",
    ),
    (
        "a question of a history that is empty",
        {"instruction": "u", "output": "a", "history": [["", "b"]]},
        "history[0]: is empty; expected a text or messages",
    ),
    ("a prompt that is empty", {"prompt": "", "completion": "a"}, "prompt: is empty; expected a text or messages"),
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
    ("a message alone", user("u"), "a message alone (role)"),
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
    [fault] = report.fault_lines()
    assert fault.startswith(f"{path}:2: ")
    assert "prompt and completion (`prompt` and `completion` of text); expected ShareGPT" in fault


def test_a_loss_is_an_error_until_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "sounds.jsonl", *[GOOD | {"audios": ["a.wav"]}] * 5)
    to = tmp_path / "rows.jsonl"
    words = ["import", str(path), "--to", str(to)]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: 5 of 5 records cannot be converted" in err
    places = ", ".join(f"{path}:{number}" for number in (1, 2, 3))
    assert f"(audios): 5 rows ({places}, …)" in err
    assert "--lossy media" in err
    assert not to.exists()
    assert main([*words, "--lossy", "media"]) == 0
    assert to.read_text("utf-8") == 5 * (json.dumps(GOOD) + "\n")
    assert "lost     media" in capsys.readouterr().out
    assert main([*words, "--lossy", "media"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["import", str(path), "--to", str(tmp_path / "b"), "--lossy", "all"]) == 2
    assert "--lossy: unknown kind 'all'; expected one of rejected" in capsys.readouterr().err


def test_the_remains_of_a_killed_import_go_and_folders_are_made(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "out").mkdir()
    (left := tmp_path / "out" / ".rows.jsonl.abcdefgh.unfinished").touch()
    os.utime(left, (0, 0))
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


@pytest.mark.parametrize("lossy", [(), ("--lossy", "bad-records")])
def test_a_file_of_nothing_but_bad_records_is_not_read_to_its_end(
    lossy: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_MOST_BAD", 50)
    source, made = tmp_path / "rows.jsonl", tmp_path / "made.jsonl"
    bad = '{"messages": []}\n'
    source.write_text(bad * 49 + json.dumps(GOOD) + "\n" + bad * 100)
    assert main(["import", str(source), "--to", str(made), "--lossy", "bad-records"]) == 0
    made.unlink()
    source.write_text(bad * 60 + json.dumps(GOOD) + "\n")
    assert main(["import", str(source), "--to", str(made), *lossy]) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl: none of its first 50 records can be converted" in error
    assert "rows.jsonl:1" in error
    assert not made.exists()


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


@pytest.mark.parametrize("column", [{"k\ud800": "x"}, {"k": {"deep": ["\ud800"]}}], ids=["name", "value"])
def test_a_column_that_no_file_can_hold_is_a_bad_record(
    column: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    source, made = tmp_path / "own.jsonl", tmp_path / "rows.jsonl"
    source.write_text(f"{json.dumps({**row, **column})}\n{json.dumps(row)}\n")
    assert main(["import", str(source), "--to", str(made)]) == 2
    error = capsys.readouterr().err
    assert f"{source}:1, " in error
    assert "lone surrogate" in error
    assert not made.exists()
    assert main(["import", str(source), "--to", str(made), "--lossy", "bad-records"]) == 0
    assert made.read_text(encoding="utf-8") == f"{json.dumps(row)}\n"
