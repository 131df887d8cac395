from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import pytest
from check_outcomes import outcome_of

from pytest_mistral_lora.conformance.check_options import CheckOptions
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.known import (
    Xfail,
    finders_of,
    known_among,
    read_xfails,
    unknown_among,
)
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.conformance.written_xfails import xfails_text
from pytest_mistral_lora.places import Place


def outcome(case: str, *findings: Finding, not_checked: str = "") -> CheckOutcome:
    return outcome_of(f"a::{case}", *findings, not_checked=not_checked)


def listed(outcomes: list[CheckOutcome]) -> str:
    return xfails_text(outcomes, CheckOptions())


def entries(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.of_field
def test_a_rule_of_one_check_is_listed_by_the_check_and_one_of_several_by_itself() -> None:
    text = listed(
        [
            outcome(
                "dataset::x",
                Finding("ML601", "'bot'", Place.of("rows.jsonl", 3)),
                Finding("ML601", "'cat'", Place.of("rows.jsonl", 4)),
            ),
            outcome("dataset::y", Finding("ML004", "other ids")),
            outcome("dataset::z", Finding("ML004", "other ids"), Finding("ML426", "a note")),
            outcome("dataset::w", not_checked="no base"),
        ]
    )
    assert entries(text) == ["mistral-golden::a::dataset::x  # ", "ML004  # "]
    assert "# ML601 (2 findings) rows.jsonl:3: 'bot'" in text
    assert "# ML004 (2 findings in 2 checks) " in text


def test_a_cause_with_a_name_is_listed_and_accepted_by_it(tmp_path: Path) -> None:
    named, other = Finding("ML004", "dropped", name="content-beside-call-dropped"), Finding("ML004", "a space")
    text = listed([outcome("dataset::x", named), outcome("dataset::y", named), outcome("dataset::z", other)])
    assert entries(text) == ["content-beside-call-dropped  # ", "mistral-golden::a::dataset::z  # "]
    file = tmp_path / "known.txt"
    file.write_text("content-beside-call-dropped  # we never mix them\n")
    xfails = read_xfails(file)
    assert unknown_among([named, other], "mistral-golden::a::dataset::x", xfails) == [other]
    assert known_among([other], "mistral-golden::a::dataset::x", xfails) == []
    assert known_among([named], "mistral-golden::a::dataset::x", xfails) == list(xfails)
    file.write_text("content-beside-call-droped  # a typo\n")
    with pytest.raises(ValueError, match=r"known\.txt:1: .*did you mean 'content-beside-call-dropped'"):
        read_xfails(file)


def test_a_name_within_a_rule_is_listed_and_accepted_by_it(tmp_path: Path) -> None:
    encoding, labels = (Finding("ML107", "found", name=f"ML107.{name}") for name in ("encoding", "labels"))
    check = "mistral-golden::a::mask::mistral-common-agrees"
    assert entries(listed([outcome("mask::mistral-common-agrees", encoding)])) == ["ML107.encoding  # "]
    file = tmp_path / "known.txt"
    file.write_text("ML107.encoding  # looked at\n")
    assert unknown_among([encoding, labels], check, read_xfails(file)) == [labels]
    file.write_text("ML107  # looked at\n")
    assert unknown_among([encoding, labels], check, read_xfails(file)) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ML119", "expected ML107.encoding"),
        ("ML304", "expected ML301.loss"),
        ("ML316", "expected ML307.values"),
        ("ML107.encodings", "there is no rule"),
        ("ML111", "there is no rule"),
    ],
)
def test_an_id_that_is_no_rule_any_more_is_an_error(name: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "known.txt"
    file.write_text(f"{name}  # looked at\n")
    with pytest.raises(ValueError, match=rf"known\.txt:1: .*{expected}"):
        read_xfails(file)


@pytest.mark.of_field
def test_strict_runs_fail_by_notes_and_unchecked_items_too() -> None:
    outcomes = [outcome("dataset::z", Finding("ML426", "a note")), outcome("dataset::w", not_checked="no base")]
    assert entries(listed(outcomes)) == []
    strict = xfails_text(outcomes, CheckOptions(fail_on=frozenset({"note", "not-checked"})))
    assert entries(strict) == ["mistral-golden::a::dataset::w  # ", "mistral-golden::a::dataset::z  # "]
    assert "# not checked: no base" in strict


def test_a_list_of_an_editor_on_windows_is_read(tmp_path: Path) -> None:
    file = tmp_path / "known.txt"
    file.write_bytes(b"\xef\xbb\xbf# ours\r\nML204  # looked at\r\n")
    assert [(one.id, one.place) for one in read_xfails(file)] == [("ML204", f"{file}:2")]
    file.write_bytes("# ours\nML204  # geprüft\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"known\.txt:2: not valid UTF-8; save the file as UTF-8"):
        read_xfails(file)


def test_a_hostile_text_is_no_entry(tmp_path: Path) -> None:
    text = listed([outcome("dataset::x", Finding("ML601", "a\nML004  # fine\u2028ML005 # fine\x1e" + 200 * "b"))])
    assert entries(text) == ["mistral-golden::a::dataset::x  # "]
    file = tmp_path / "known.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"known\.txt:5: 'mistral-golden::a::dataset::x' has no reason"):
        read_xfails(file)
    file.write_text(text.replace("  # \n", "  # looked at\n"))
    assert [(one.id, one.reason) for one in read_xfails(file)] == [("mistral-golden::a::dataset::x", "looked at")]


FORMS = (
    "# Until 2099-12-31",
    "# UNTIL 2099-12-31",
    "# until: 2099-12-31",
    "# until=2099-12-31",
    "# until 2099-12-31.",
    "# until 2099-12-31 at the latest",
    "# until 31.12.2099",
    "until 2099-12-31",
    "Until: 2099-12-31",
    "(until 2099-12-31)",
    "till 2099/12/31",
    "expires 2099-12-31",
    "Expires on: 31 December 2099",
    "valid through Dec 31, 2099",
    "until the end of December 2099",
    "until June 2027",
    "until 2027",
    "until Q3 2027",
    "until 30 June",
    "remove by 2099-12-31",
    "2099-12-31",
    "2020-12-31",
    "fixed 2099-12-31T00:00:00Z",
    "until 20991231",
    # seen on a day to come, or in a form that does not tell which day it was
    "seen since 2099-12-31",
    f"seen on {date.today() + timedelta(days=2)}",
    "seen on 01.03.2025",
)
"""Dates that a writer expects to end a deviation, in forms that do not."""

REASONS = (
    "seen since 2025-03-01 in our logs",
    f"seen on {date.today()}",
    "https://example.com/2025-03-01/post",
    "the folder run-2099-12-31 is ours",
    "rows of up to 2048 tokens",
    "wait until 2048 tokens are read",
    "mistral-small-2506, version 2024.1",
    "not with version 2024.1.2 of OpenVINO",
    "until the vendor answers",
    "we serve it until may be changed",
    "ratio 1/2 of the rows",
)
"""Reasons without a date of an end."""


@pytest.mark.parametrize("form", FORMS)
def test_a_date_that_would_not_end_a_deviation_is_refused_with_the_exact_form(form: str, tmp_path: Path) -> None:
    file = tmp_path / "known.txt"
    # as the last part of the line, or within the reason
    for line in (f"ML204  # the trainer's  {form}", *([f"ML204  {form}"] if form.startswith("#") else ())):
        file.write_text(f"# ours\n{line}\n")
        with pytest.raises(ValueError, match=r"known\.txt:2: .*(until 2027-06-30|has no reason)"):
            read_xfails(file)


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_without_a_date_of_an_end_is_read(reason: str, tmp_path: Path) -> None:
    file = tmp_path / "known.txt"
    file.write_text(f"ML204  # {reason}\nML205  # {reason}  # until 2099-12-31\n")
    first, second = read_xfails(file)
    assert (first.reason, first.until) == (reason, None)
    assert (second.reason, str(second.until)) == (reason, "2099-12-31")


@pytest.mark.parametrize(
    ("name", "subject", "case", "finds", "is_home"),
    [
        ("ML401", "adapter", "tensors-complete", True, True),
        ("ML401", "adapter", "tensors-finite", False, False),
        ("ML401", "merged", "weights", True, False),
        ("ML401", "mask", "labels", False, False),
        ("ML204", "tokenizer", "model-config", True, True),
        ("ML520", "encoded", "ids", True, True),
        ("ML520", "runner", "any-row", True, True),
        ("ML401", "runner", "tensors-complete", False, False),
        ("ML649", "dataset", "answers-are-read-back", True, True),
        ("ML649", "encoded", "answers", True, False),
        ("ML649", "runner", "any-row", True, False),
        ("ML107.encoding", "mask", "mistral-common-agrees", True, True),
        ("ML107.labels", "dataset", "laws-hold", True, False),
        ("default-system-prompt", "template", "any", True, True),
        ("default-system-prompt", "dataset", "any", True, False),
        ("default-system-prompt", "adapter", "any", False, False),
    ],
)
def test_a_deviation_is_looked_for_by_the_checks_that_can_find_it(
    name: str, subject: str, case: str, finds: bool, is_home: bool
) -> None:
    finders = finders_of(Xfail(name, "looked at", "known.txt:1"))
    assert (finders.have(subject, case), finders.are_at_home_in(subject, case)) == (finds, is_home)
