"""A known deviation is out of date if every check that can find it ran, on whatever front, and none did."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from check_outcomes import outcome_of

from pytest_mistral_lora.conformance.check_options import CheckOptions
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.known import Xfail, read_xfails
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.conformance.session import Session
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.places import Place

TARGET = Target("a", Path("a"))
DUPLICATE = Finding("ML608", "the same row", "rows.jsonl:2")


def session_of(*xfails: Xfail, **options: Any) -> Session:
    settings = Settings(1, None, "cpu", options.pop("skip_training", False), (), False, Path())
    targets = options.pop("targets", [TARGET])
    decided = CheckOptions(xfails=xfails, fail_on=frozenset(options.pop("fail_on", ())))
    return Session(lambda: targets, settings, decided, **options)


def judge(session: Session, subject: Any, case: str, result: Result | None) -> CheckOutcome:
    check = Check(TARGET, subject, case, Result)
    nodeid = f"mistral-golden::{check.name}"
    if nodeid not in session.collected:
        session.collected.append(nodeid)
    outcome = CheckOutcome.stopped(check) if result is None else session.outcome_of(check, result)
    session.take(outcome)
    return outcome


def entry(name: str, until: date | None = None) -> Xfail:
    return Xfail(name, "looked at", "known.txt:1", until)


def test_an_entry_that_every_finder_missed_is_out_of_date() -> None:
    session = session_of(entry("ML608"))
    judge(session, "dataset", "no-duplicates", Result())
    assert (session.unmatched, session.not_met, session.exit_code) == ([entry("ML608")], [], 1)


@pytest.mark.parametrize("name", ["ML204", "mistral-golden::b::dataset::no-duplicates", "default-system-prompt"])
def test_an_entry_of_checks_that_are_not_in_the_run_is_not_met(name: str) -> None:
    session = session_of(entry(name))
    judge(session, "dataset", "no-duplicates", Result())
    assert (session.unmatched, session.not_met, session.exit_code) == ([], [entry(name)], 0)


def test_an_entry_of_a_check_that_its_subject_does_not_have_is_out_of_date() -> None:
    misspelled = entry("mistral-golden::a::dataset::no-duplicate")
    session = session_of(misspelled)
    judge(session, "dataset", "no-duplicates", Result())
    assert (session.unmatched, session.not_met, session.exit_code) == ([misspelled], [], 1)


def test_an_entry_of_a_check_that_was_deselected_is_not_met() -> None:
    nodeid = "mistral-golden::a::dataset::no-leakage"
    session = session_of(entry(nodeid))
    judge(session, "dataset", "no-duplicates", Result())
    session.collected.append(nodeid)
    assert (session.unmatched, session.not_met) == ([], [entry(nodeid)])


def test_an_entry_is_not_met_if_one_finder_did_not_run() -> None:
    session = session_of(entry("ML608"))
    judge(session, "dataset", "no-duplicates", Result())
    session.collected.append("mistral-golden::b::dataset::no-duplicates")  # deselected, or after -x
    assert (session.unmatched, session.exit_code) == ([], 0)


def test_an_entry_is_not_met_if_no_finder_could_judge() -> None:
    session = session_of(entry("ML608"))
    judge(session, "dataset", "no-duplicates", Result(not_checked="no rows"))
    judge(session, "tokenizer", "file", Result())
    assert (session.unmatched, session.exit_code) == ([], 0)


def test_targets_that_the_command_line_replaces_may_have_the_deviation() -> None:
    session = session_of(entry("ML608"), leaves_out_targets=True)
    judge(session, "dataset", "no-duplicates", Result())
    assert session.unmatched == []


@pytest.mark.parametrize(("skip", "out_of_date"), [(True, False), (False, True)])
def test_the_tiny_train_judges_its_own_adapter_too(skip: bool, out_of_date: bool) -> None:
    session = session_of(entry("ML424"), skip_training=skip, targets=[Target("b", Path("b"), trains=True)])
    judge(session, "adapter", "layers-trained", Result())
    assert bool(session.unmatched) == out_of_date


def test_a_known_finding_is_accepted_and_met() -> None:
    session = session_of(entry("ML608"))
    outcome = judge(session, "dataset", "no-duplicates", Result((DUPLICATE,)))
    assert (outcome.findings, outcome.known) == ((), (entry("ML608"),))
    assert (session.unmatched, session.not_met, session.exit_code) == ([], [], 0)


def test_from_its_date_on_a_finding_fails_and_names_the_entry() -> None:
    today = date.today()
    over, valid = entry("ML601", today), entry("ML602", today + timedelta(days=1))
    session = session_of(over, valid)
    findings = (Finding("ML601", "'bot'", "rows.jsonl:1"), Finding("ML602", "no JSON", "rows.jsonl:2"))
    outcome = judge(session, "dataset", "rows-are-valid", Result(findings))
    assert outcome.state == "failed"
    [finding] = outcome.findings
    assert finding.rule == "ML601"
    assert finding.detail == f"accepted until {today} (known.txt:1): looked at"
    assert [known.id for known in outcome.known] == ["ML602"]
    # it is met: the finding is there
    assert (session.unmatched, session.not_met) == ([], [])


def test_outcomes_of_another_process_count_like_those_of_this_one() -> None:
    made = session_of(entry("ML608"))
    here = session_of(entry("ML608"))
    outcome = judge(made, "dataset", "no-duplicates", Result((DUPLICATE,)))
    here.collected, here.deselected = made.collected, made.deselected
    here.take(CheckOutcome.from_json(json.loads(json.dumps(outcome.to_json()))))
    assert (here.unmatched, here.exit_code, here.not_run) == ([], 0, 0)


def test_an_outcome_comes_back_from_its_plain_data() -> None:
    findings = (
        Finding(
            "ML628",
            "marked up",
            Place.of("rows.jsonl", 2),
            row="{}",
            name="a",
            severity="error",
            covers=(("ML601", 2),),
        ),
        Finding(
            "ML628", "marked up", Place.of("rows.jsonl", 3), detail="first", shape="x", more=3, fix="`pip install x`"
        ),
        Finding("ML533", "a turn is lost", Place.of("rows.jsonl", 4), effect_of="ML442"),
    )
    here = outcome_of("a::dataset::texts", *findings, facts={"rows": 3}, seconds=0.25, commands={"rerun": "x"})
    there = CheckOutcome.from_json(json.loads(json.dumps(here.to_json())))
    assert there == here
    assert [finding.severity for finding in there.findings] == ["error", "note", "error"]
    known = outcome_of("a::dataset::texts", known=(entry("ML608"),), state="known")
    [xfail] = CheckOutcome.from_json(known.to_json()).known
    assert (xfail.id, xfail.reason) == ("ML608", "looked at")


def test_a_run_in_which_nothing_was_judged_is_not_fine() -> None:
    session = session_of()
    judge(session, "dataset", "no-duplicates", Result(not_checked="no rows"))
    assert (session.nothing_judged, session.exit_code) == (True, 1)
    judge(session, "dataset", "rows-are-valid", Result())
    assert (session.nothing_judged, session.exit_code) == (False, 0)


@pytest.mark.parametrize(
    ("fail_on", "expected"),
    [
        ((), ["passed", "skipped"]),
        (("note",), ["failed", "skipped"]),
        (("not-checked",), ["passed", "failed"]),
        (("note", "not-checked"), ["failed", "failed"]),
    ],
)
def test_notes_and_checks_that_could_not_judge_fail_if_you_ask_for_it(
    fail_on: tuple[str, ...], expected: list[str]
) -> None:
    session = session_of(fail_on=fail_on)
    note = judge(session, "dataset", "texts-are-whole", Result((Finding("ML609", "near"),)))
    unchecked = judge(session, "dataset", "backends-agree", Result(not_checked="one backend"))
    assert [note.state, unchecked.state] == expected


def test_a_check_that_stopped_with_an_error_has_failed() -> None:
    session = session_of()
    assert judge(session, "dataset", "statistics", None).state == "failed"
    assert session.exit_code == 1


@pytest.mark.parametrize(
    ("line", "reason", "until"),
    [
        ("ML204  # looked at  # until 2027-06-30", "looked at", date(2027, 6, 30)),
        ("ML204 # see issue #12 # until 2027-06-30", "see issue #12", date(2027, 6, 30)),
        ("ML204 # until the next release", "until the next release", None),
    ],
)
def test_a_line_may_end_in_a_date(line: str, reason: str, until: date | None, tmp_path: Path) -> None:
    file = tmp_path / "known.txt"
    file.write_text(f"{line}\n")
    assert read_xfails(file) == (Xfail("ML204", reason, f"{file}:1", until),)


@pytest.mark.parametrize("written", ["2027-13-01", "2027-1-1", "20270101", "next year", ""])
def test_a_date_that_is_none_is_an_error_with_its_line(written: str, tmp_path: Path) -> None:
    file = tmp_path / "known.txt"
    file.write_text(f"ML608  # fine\nML204  # looked at  # until {written}\n")
    with pytest.raises(ValueError, match=rf"known\.txt:2: '{f'until {written}'.strip()}' is not a date"):
        read_xfails(file)


def test_a_date_is_no_reason(tmp_path: Path) -> None:
    file = tmp_path / "known.txt"
    file.write_text("ML204  # until 2027-06-30\n")
    with pytest.raises(ValueError, match=r"known\.txt:1: 'ML204' has no reason"):
        read_xfails(file)
