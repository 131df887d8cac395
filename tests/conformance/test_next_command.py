"""The last line of a verdict names the command to run next."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from check_outcomes import outcome_of

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.collection import NamedPaths
from pytest_mistral_lora.conformance.finding import EXAMPLE_PATHS, RULES, Finding
from pytest_mistral_lora.conformance.next_command import next_command
from pytest_mistral_lora.conformance.session import Session, opened_session
from pytest_mistral_lora.conformance.targets import Target

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
MakeSession = Callable[..., Session]


@pytest.fixture
def session_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeSession:
    """Makes a session with one finding, in a folder with `checkpoint` and `lora-out`."""
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint", "lora-out"):
        (tmp_path / name).mkdir()

    def make(*findings: Finding) -> Session:
        with opened_session([Target("spm-v3")]) as session:
            session.collected = ["mistral-golden::t::template::x"]
            session.take(outcome_of("t::template::x", *findings))
        return session

    return make


def test_a_fix_that_can_be_run_as_it_is_comes_first(session_of: MakeSession) -> None:
    paths = {"checkpoint": "checkpoint", "template": "checkpoint/chat_template.jinja"}
    written = "mistral-lora template --tokenizer checkpoint --output checkpoint/chat_template.jinja"
    assert next_command(session_of(Finding("ML004", "x").with_paths(paths))) == written
    # a path of the documentation is nowhere on this machine
    assert next_command(session_of(Finding("ML004", "x"))) == "mistral-lora rules ML004"


def test_the_command_that_was_run_is_not_the_next_one(session_of: MakeSession) -> None:
    found = Finding("ML702", "x").with_paths({"adapter": "lora-out"})
    assert next_command(session_of(found), "mistral-lora check lora-out") == "mistral-lora verify lora-out"
    for command in ("mistral-lora verify lora-out", "mistral-lora verify lora-out --dataset rows.jsonl"):
        assert next_command(session_of(found), command) == "mistral-lora rules ML702"


@pytest.mark.parametrize("rule", ["ML005", "ML804", "ML601"], ids=["VERSION", "--update", "no command"])
def test_what_must_be_filled_in_or_accepted_is_only_explained(rule: str, session_of: MakeSession) -> None:
    found = Finding(rule, "x").with_paths({"adapter": "lora-out"})
    assert next_command(session_of(found)) == f"mistral-lora rules {rule}"


def test_a_note_is_no_reason_to_stop(session_of: MakeSession) -> None:
    note = next(rule.id for rule in RULES.values() if rule.severity == "note")
    session = session_of(Finding(note, "x"))
    assert next_command(session) == "mistral-lora init --demo"
    session.options = replace(session.options, fail_on=frozenset({"note"}))
    assert next_command(session) == f"mistral-lora rules {note}"


def test_part_of_a_run_leads_nowhere(session_of: MakeSession) -> None:
    session = session_of()
    session.collected.append("mistral-golden::t::template::y")
    assert next_command(session) == ""


def test_sound_rows_need_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    with opened_session(NamedPaths(datasets=[Path("rows.jsonl")], judges=[Path("spm-v3")]).targets()) as session:
        list(session.run())
        assert next_command(session) == "mistral-lora init rows.jsonl --base OWNER/NAME"


def test_pairs_are_for_another_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rated = {"prompt": TALK[:1], "completion": TALK[1:], "label": True}
    Path("rows.jsonl").write_text(json.dumps(rated) + "\n")
    with opened_session(NamedPaths(datasets=[Path("rows.jsonl")], judges=[Path("spm-v3")]).targets()) as session:
        list(session.run())
        assert {outcome.state for outcome in session.outcomes} <= {"passed", "skipped"}
        assert next_command(session) == ""


def test_check_ends_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"messages": TALK[:1]}) + "\n")
    assert main(["check", "rows.jsonl", "--tokenizer", "spm-v3"]) == 1
    assert capsys.readouterr().out.endswith("\nnext: mistral-lora rules ML601\n")


def test_no_fix_of_a_rule_keeps_a_placeholder() -> None:
    for rule in RULES.values():
        assert not any(f"{{{name}" in rule.fix for name in EXAMPLE_PATHS), rule.id
        assert "CHECKPOINT" not in rule.fix


def test_a_path_is_quoted_for_a_shell_or_for_python() -> None:
    paths = {"checkpoint": "my models/it's", "folder": "my models/it's"}
    assert "'my models/it'\"'\"'s'" in Finding("ML004", "x").with_paths(paths).next_step
    assert (
        'from_pretrained("my models/it\'s")'
        in Finding("ML206", "x", fix="from_pretrained({checkpoint!r})").with_paths(paths).next_step
    )
