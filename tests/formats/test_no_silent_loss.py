"""Nothing of a record is dropped, doubled or read from another column without a word, in the forms that people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from imported import BARE, GOOD, TOOL, answer, call, calls, chat, converted, user, written
from pyarrow import parquet

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError

SYSTEM = {"role": "system", "content": "s"}
WHOLE = [SYSTEM, user("u"), answer("a")]
ROWS: list[tuple[str, Any, Any]] = [
    ("Dolly", {"instruction": "i", "context": "c", "response": "a"}, chat(user("i\nc"), answer("a"))),
    (
        "query and response",
        {"query": "u", "response": "a", "history": [["v", "b"]], "system": "s"},
        chat(SYSTEM, user("v"), answer("b"), user("u"), answer("a")),
    ),
    (
        "OpenOrca",
        {"system_prompt": "s", "question": "u", "response": "a"},
        chat(SYSTEM, user("u"), answer("a")),
    ),
    (
        "a prompt of messages, and a chosen conversation that has them",
        {"prompt": [SYSTEM, user("u")], "chosen": WHOLE, "rejected": WHOLE},
        chat(*WHOLE),
    ),
    (
        "a chosen conversation with a system prompt of its own",
        {"prompt": "u", "chosen": WHOLE, "rejected": WHOLE},
        chat(*WHOLE),
    ),
    (
        "a chosen conversation that is JSON in a column",
        {"prompt": "u", "chosen": json.dumps(GOOD["messages"]), "rejected": "[]"},
        GOOD,
    ),
    (
        "a completion that has its prompt",
        {"prompt": [user("u")], "completion": [user("u"), answer("a")]},
        GOOD,
    ),
    (
        "thinking of Mistral's API",
        chat(user("u"), answer([{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}])),
        chat(user("u"), answer([{"type": "thinking", "thinking": "t"}])),
    ),
    (
        "only_last as pandas writes it",
        chat(user("u"), answer("a"), user("v"), answer("b"), only_last="True"),
        chat(user("u"), answer("a", weight=0), user("v"), answer("b")),
    ),
    ("the index of pandas", {"": "7", "instruction": "u", "output": "a"}, GOOD | {"": "7"}),
    ("a speaker's name in `from`", {"messages": [{**user("u"), "from": "user"}, answer("a")]}, GOOD),
]


@pytest.mark.parametrize(("name", "record", "row"), ROWS, ids=[case[0] for case in ROWS])
def test_a_record_is_read_as_it_is_meant(tmp_path: Path, name: str, record: Any, row: Any) -> None:
    found, report = converted(written(tmp_path / "a.jsonl", record))
    assert report.fault_lines() == []
    assert found == [row]


LOST: list[tuple[Any, str, str]] = [
    (GOOD | {"system": "s", "system_prompt": "t"}, "system", "system_prompt"),
    (GOOD | {"tools": [TOOL], "functions": [{**BARE, "name": "g"}]}, "keys", "functions"),
    (GOOD | {"rejected_response": "b"}, "rejected", "rejected_response"),
    ({"prompt": "u", "completion": "a", "label": 0}, "unwanted", "label"),
    ({"prompt": "u", "completion": "a", "label": "0"}, "unwanted", "label"),
    (GOOD | {"label": "FALSE"}, "unwanted", "label"),
    (chat({**user("u"), "from": "Ann"}, answer("a")), "message-keys", "from"),
    (chat(user([{"type": "text", "text": "u", "cache_control": {}}]), answer("a")), "message-keys", "cache_control"),
    (chat(user([{"type": "text", "value": "u", "lang": "en"}]), answer("a")), "message-keys", "lang"),
    (
        chat(
            user("u"),
            calls(call("a"), call("b")),
            {"role": "tool", "content": "[1, 2]", "took": 3, "name": "f"},
            answer("a"),
        ),
        "message-keys",
        "took",
    ),
    (
        {
            "input": {"messages": [user("u")], "tools": [TOOL]},
            "tools": [{**TOOL, "function": {**BARE, "name": "g"}}],
            "preferred_output": [answer("a")],
            "non_preferred_output": [answer("b")],
        },
        "keys",
        "input.tools",
    ),
]


@pytest.mark.parametrize(("record", "kind", "detail"), LOST, ids=[f"{case[1]}-{case[2]}" for case in LOST])
def test_a_part_that_a_row_cannot_keep_is_a_loss_with_its_name(
    tmp_path: Path, record: Any, kind: str, detail: str
) -> None:
    _, report = converted(written(tmp_path / "a.jsonl", record))
    assert report.faults == {}
    assert detail in report.losses[kind].details


REFUSED: list[tuple[Any, str]] = [
    ({"prompt": "Human: u", "chosen": GOOD["messages"], "rejected": []}, "chosen: begins with another question"),
    ({"prompt": "v", "completion": GOOD["messages"]}, "completion: begins with another question"),
    ({"instruction": "i", "output": "a", "history": 5}, "history: is a number; expected a list of pairs"),
    (
        {"messages": [{**user("u"), "from": "gpt"}, answer("a")]},
        "messages[0].from: 'gpt', and `role` is 'user'; expected one role",
    ),
    (chat(user([{"type": ["text"], "text": "u"}]), answer("a")), "content[0].type: ['text']; expected 'text'"),
    (chat(user([{"type": "tool_use", "id": "x"}]), answer("a")), "content[0].type: 'tool_use'; expected 'text'"),
]


@pytest.mark.parametrize(("record", "said"), REFUSED, ids=[case[1][:40] for case in REFUSED])
def test_a_record_of_two_meanings_is_refused_with_its_field(tmp_path: Path, record: Any, said: str) -> None:
    _, report = converted(written(tmp_path / "a.jsonl", record))
    [line] = report.fault_lines()
    assert line.startswith(f"{tmp_path / 'a.jsonl'}:1, ")
    assert said in line


def test_a_number_beside_messages_is_a_class_of_the_users_own(tmp_path: Path) -> None:
    found, report = converted(written(tmp_path / "a.jsonl", GOOD | {"label": 0}))
    assert (found, report.losses) == ([GOOD | {"label": 0}], {})


def test_the_users_own_keys_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(
        tmp_path / "a.jsonl", {"question": "u", "context": "c", "answer": "a"}, {"question": "u", "answer": "a"}
    )
    assert main(["import", str(path), "--to", str(tmp_path / "rows.jsonl")]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept     own-keys ")]
    assert line.endswith(f": context: 1 row ({path}:1)")
    assert main(["import", str(path), "--to", str(tmp_path / "again.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["own_keys"] == {"context": 1}


TABLES: dict[str, tuple[pa.Table, str]] = {
    "columns": (
        pa.table([["i"], ["x"], ["a"]], names=["instruction", "instruction", "output"]),
        "two columns have one name: instruction",
    ),
    "fields": (
        pa.table(
            {
                "messages": pa.ListArray.from_arrays(
                    [0, 1], pa.StructArray.from_arrays([["user"], ["u"], ["v"]], names=["role", "content", "content"])
                )
            }
        ),
        "a row after row 0 cannot be read: Converting to Python dictionary",
    ),
    "years": (
        pa.table({"prompt": ["u"], "completion": ["a"], "at": pa.array([10**12], pa.timestamp("s"))}),
        "a row after row 0 cannot be read: ",
    ),
}


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_python_cannot_hold_is_an_error_of_its_file(tmp_path: Path, name: str, form: str) -> None:
    path, (table, said) = tmp_path / f"a.{form}", TABLES[name]
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(InputError) as caught:
        converted(path)
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    "text",
    [
        ",instruction,output\n0,u,a\n1,u,a\n",
        "\n\ninstruction,output\nu,a\n\nu,a\n",
        'instruction,output,"of\ntwo lines"\nu,a,\nu,a,\n',
    ],
    ids=["index", "blank lines", "header of two lines"],
)
def test_a_csv_of_a_spreadsheet_or_pandas_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8", newline="")
    found, report = converted(path)
    assert report.fault_lines() == []
    assert [one["messages"] for one in found] == [GOOD["messages"]] * 2


def test_pairs_of_pandas_keep_the_index_out_of_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",chosen,rejected\n5,b,c\n", encoding="utf-8")
    _, report = converted(path)
    assert "a chosen answer without its prompt" in report.fault_lines()[0]
