"""Answers to rows are recorded as transcripts, as they are compared later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import CONVERSATIONS, smoke, write_rows

from pytest_mistral_lora.records.transcripts import load, load_folder

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"type": "string", "enum": ["C", "F"]}, "city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def test_a_transcript_keeps_the_key_order_of_a_tool(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = tmp_path / "golden"
    messages = [{"role": "user", "content": "Is it warm in Rome?"}, {"role": "assistant", "content": "It is."}]
    row = {"messages": messages, "tools": [WEATHER]}
    rows = tmp_path / "ask.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    ask = (adapter, "--base", base, "--rows", rows, "--record", golden, "--max-new-tokens", "4")
    assert smoke(*ask) == 0
    file = golden / "row-0001.json"
    assert json.dumps(load(file).row.to_json()) == json.dumps(row)
    assert smoke(adapter, "--base", base, "--golden", golden) == 0
    # sorted keys make another text of the tool
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    capsys.readouterr()
    assert smoke(adapter, "--base", base, "--golden", golden) == 2
    assert "other ids: prompt token " in capsys.readouterr().err


def test_what_is_recorded_is_what_is_compared(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, golden = write_rows(tmp_path / "ask.jsonl", CONVERSATIONS[:2]), tmp_path / "golden"
    (tmp_path / "answer.json").write_text('{"type": "string"}')
    ask = (adapter, "--base", base, "--rows", rows, "--record", golden)
    checks = ("--check", "eos", "--check", f"json_schema={tmp_path / 'answer.json'}", "--check", "max_tokens=40")
    assert smoke(*ask, *checks, "--max-new-tokens", "20") == 0
    assert [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()] == [
        "row-0001.json",
        "row-0002.json",
    ]
    found = load_folder(golden)
    assert [(one["name"], one["passed"]) for one in found[0].checks] == [
        ("eos", True),
        ("json_schema:answer.json", False),
        ("max_tokens:40", True),
    ]
    assert found[0].max_new_tokens == 20
    assert smoke(adapter, "--base", base, "--golden", golden) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 exact")
    assert smoke(adapter, "--base", base, "--golden", golden / "row-0002.json") == 0
    assert smoke(*ask) == 2
    assert "has transcripts already" in capsys.readouterr().err
    assert smoke(*ask, "--check", "jsno") == 2
    assert "expected json, tool_call, eos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--record", "x"], "expected --rows ROWS.jsonl"), (["--golden", "x", "--rows", "y"], "brings its own rows")],
)
def test_options_that_do_not_go_together(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke("out", *words) == 2
    assert said in capsys.readouterr().err


def test_another_trainers_adapter_can_be_recorded(adapter: Path, base: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "DECISION.md", "training_log.jsonl"):
        (adapter / name).unlink()
    rows = write_rows(tmp_path / "ask.jsonl", CONVERSATIONS[:1])
    assert smoke(adapter, "--base", base, "--rows", rows, "--record", tmp_path / "golden") == 0
    assert load(tmp_path / "golden" / "row-0001.json").model["base"] == "tiny"
