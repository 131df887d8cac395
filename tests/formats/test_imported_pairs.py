"""Preference pairs and rated answers of every form become TRL's, and nothing of either answer is lost."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from imported import ANSWER, BARE, GOOD, SYSTEM, TOOL, USER, answer, call, calls, chat, result, sharegpt, user, written

from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.chat.row_files import scan_records
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.formats.convert import Source, convert
from pytest_mistral_lora.formats.report import Report
from pytest_mistral_lora.formats.sources import open_rows

A, B = [ANSWER], [answer("b")]
EARLIER = [user("t"), answer("s")]


def a_pair(*prompt: Any, chosen: Any = A, rejected: Any = B, **more: Any) -> dict[str, Any]:
    return {"prompt": list(prompt) or [USER], "chosen": chosen, "rejected": rejected, **more}


def rated(label: bool, *, prompt: Any = (USER,), **more: Any) -> dict[str, Any]:
    return {"prompt": [*prompt], "completion": A, "label": label, **more}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def converted(path: Path, lossy: Collection[str] = ()) -> tuple[list[Any], Report]:
    report = Report()
    return list(convert([Source(path)], report, lossy=lossy)), report


CASES: list[tuple[str, Any, Any, set[str]]] = [
    # name, record, row, kinds of changes
    ("TRL's messages", a_pair(score=1), a_pair(score=1), set()),
    ("TRL's messages of several turns", a_pair(*EARLIER, USER), a_pair(*EARLIER, USER), set()),
    ("TRL's texts", {"prompt": "u", "chosen": "a", "rejected": "b"}, a_pair(), {"pair"}),
    (
        "an implicit prompt",
        {"chosen": [*EARLIER, USER, ANSWER], "rejected": [*EARLIER, USER, *B]},
        a_pair(*EARLIER, USER),
        {"pair"},
    ),
    (
        "an implicit prompt, and answers that begin alike",
        {
            "chosen": [USER, calls(call("abcdefghi")), result("abcdefghi"), ANSWER],
            "rejected": [USER, calls(call("abcdefghi")), result("abcdefghi"), *B],
        },
        a_pair(USER, calls(call("abcdefghi")), result("abcdefghi")),
        {"pair"},
    ),
    (
        "an explicit prompt, and answers that begin alike",
        a_pair(
            chosen=[calls(call("abcdefghi")), result("abcdefghi"), ANSWER],
            rejected=[calls(call("abcdefghi")), result("abcdefghi"), *B],
        ),
        a_pair(
            chosen=[calls(call("abcdefghi")), result("abcdefghi"), ANSWER],
            rejected=[calls(call("abcdefghi")), result("abcdefghi"), *B],
        ),
        set(),
    ),
    (
        "a question and whole conversations, as in UltraFeedback",
        {
            "prompt": "u",
            "prompt_id": "7",
            "chosen": GOOD["messages"],
            "rejected": [USER, *B],
            "score_chosen": 8.5,
            "score_rejected": 5,
        },
        a_pair(prompt_id="7", score_chosen=8.5, score_rejected=5),
        {"pair"},
    ),
    (
        "UltraFeedback with a copy of the chosen conversation",
        {"prompt": "u", "chosen": GOOD["messages"], "rejected": [USER, *B], "messages": GOOD["messages"]},
        a_pair(),
        {"pair", "chosen-copy"},
    ),
    (
        "Alpaca with rounds before",
        {"instruction": "u", "input": "", "history": [["t", "s"]], "chosen": "a", "rejected": "b"},
        a_pair(*EARLIER, USER),
        {"pair", "history"},
    ),
    ("equal answers", {"prompt": "u", "chosen": "a", "rejected": "a"}, a_pair(rejected=A), {"pair"}),
    (
        "OpenAI",
        {
            "input": {"messages": [USER], "tools": [TOOL], "parallel_tool_calls": True},
            "preferred_output": A,
            "non_preferred_output": B,
        },
        a_pair(tools=[TOOL], parallel_tool_calls=True),
        {"pair"},
    ),
    (
        "calls with ids of OpenAI in both",
        a_pair(chosen=[calls(call("call_1"))], rejected=[calls(call("call_2")), result("call_2"), ANSWER]),
        a_pair(chosen=[calls(call("oqmw7zzoj"))], rejected=[calls(call("dnupqp5di")), result("dnupqp5di"), ANSWER]),
        {"call-ids"},
    ),
    (
        "Alpaca",
        {"instruction": "u", "input": "v", "chosen": "a", "rejected": "b", "system": "s"},
        a_pair(SYSTEM, user("u\nv")),
        {"pair", "input", "system"},
    ),
    (
        "ShareGPT",
        sharegpt(("human", "u"), chosen=gpt("a"), rejected=gpt("b")),
        a_pair(),
        {"pair", "roles"},
    ),
    ("ms-swift's response", GOOD | {"rejected_response": "b"}, a_pair(), {"pair"}),
    (
        "ms-swift's messages",
        chat(*EARLIER, USER, ANSWER, rejected_messages=[*EARLIER, USER, *B], system="s"),
        a_pair(SYSTEM, *EARLIER, USER),
        {"pair", "system"},
    ),
    ("ms-swift's last message", GOOD | {"rejected_messages": B}, a_pair(), {"pair"}),
    (
        "several answers with scores",
        {"prompt": "u", "responses": ["c", "b", "a"], "scores": [0.5, 0.1, 0.9]},
        a_pair(),
        {"pair", "best-worst"},
    ),
    (
        "several answers with a score in each",
        {
            "instruction": "u",
            "completions": [{"response": "b", "overall_score": 2}, {"response": "a", "overall_score": 9}],
        },
        a_pair(),
        {"pair", "best-worst"},
    ),
    ("KTO's messages", rated(True), rated(True), set()),
    ("KTO's texts", {"prompt": "u", "completion": "a", "label": False}, rated(False), {"rated"}),
    ("KTO's texts with a number", {"prompt": "u", "completion": "a", "label": 1}, rated(True), {"rated"}),
    (
        "KTO's prompt of several turns",
        rated(False, prompt=(*EARLIER, USER), id=7),
        rated(False, prompt=(*EARLIER, USER), id=7),
        set(),
    ),
    ("LLaMA-Factory's KTO", GOOD | {"kto_tag": False}, rated(False), {"rated"}),
    ("Alpaca with a tag", {"instruction": "u", "output": "a", "kto_tag": True}, rated(True), {"rated"}),
    (
        "a mark as text, as in CSV",
        GOOD | {"label": "FALSE", "functions": [BARE]},
        rated(False, tools=[TOOL]),
        {"rated", "label-letters", "function-call", "tool-form"},
    ),
]


@pytest.mark.parametrize(("name", "record", "row", "kinds"), CASES, ids=[case[0] for case in CASES])
def test_both_answers_are_kept(tmp_path: Path, name: str, record: Any, row: Any, kinds: set[str]) -> None:
    found, report = converted(written(tmp_path / "a.jsonl", *[record] * 2))
    assert report.fault_lines() == []
    assert found == [row] * 2
    assert not report.losses
    assert report.changes.keys() == kinds
    again, second = converted(written(tmp_path / "b.jsonl", found[0]))
    # a row is imported as it is
    assert (again, second.losses, second.changes) == ([found[0]], {}, {})


BROKEN = [
    ({"chosen": [USER, ANSWER], "rejected": [user("v"), *B]}, "rejected: has another prompt"),
    ({"chosen": [USER, ANSWER, user("v"), *A], "rejected": [USER, ANSWER, user("w"), *B]}, "rejected: has another"),
    (GOOD | {"rejected_messages": [user("v"), *B]}, "rejected: has another prompt"),
    ({"prompt": "u", "chosen": "a", "rejected": ""}, "messages[1].content: an empty answer"),
    (a_pair(rejected=[{"role": "bot", "content": "b"}]), "rejected[0].role: 'bot'"),
    ({"prompt": "u", "responses": ["a", "b"], "scores": [1, 1]}, "scores: a tie: each answer has the score 1"),
    (a_pair(chosen=[answer("a", train=False)]), "chosen[0].weight: 0; expected no weight"),
]


@pytest.mark.parametrize(("record", "found"), BROKEN, ids=[case[1][:40] for case in BROKEN])
def test_a_pair_that_is_none_is_refused_with_its_field(tmp_path: Path, record: Any, found: str) -> None:
    rows, report = converted(written(tmp_path / "a.jsonl", record))
    assert rows == []
    [line] = report.fault_lines()
    assert found in line


def test_what_lossy_leaves_out_makes_rows_as_before(tmp_path: Path) -> None:
    pairs = [case[1] for case in CASES if case[0] in ("TRL's texts", "several answers with scores")]
    rows, report = converted(written(tmp_path / "a.jsonl", pairs[0]), ["rejected"])
    assert (rows, report.losses.keys()) == ([GOOD], {"rejected"})
    rows, report = converted(written(tmp_path / "b.jsonl", pairs[1]), ["rejected"])
    assert (rows, report.losses.keys()) == ([GOOD], {"rejected"})
    marked = [{"prompt": "u", "completion": "a", "label": label} for label in (True, False)]
    rows, report = converted(written(tmp_path / "c.jsonl", *marked), ["unwanted"])
    assert (rows, report.dropped) == ([GOOD | {"label": True}], 1)


def test_the_file_of_import_is_read_as_it_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"prompt": "u", "chosen": "a", "rejected": text} for text in ("b", "c")]
    to = tmp_path / "rows.jsonl"
    assert main(["import", str(written(tmp_path / "pairs.jsonl", *records)), "--to", str(to)]) == 0
    assert "changed  pair" in capsys.readouterr().out
    written_rows = [json.loads(line) for line in to.read_text(encoding="utf-8").splitlines()]
    assert written_rows == [a_pair(), a_pair(rejected=[answer("c")])]
    [source] = open_rows(tmp_path / "pairs.jsonl")
    for file in (to, source):
        assert list(scan_records(file)) == [parse_rows(record) for record in written_rows]
