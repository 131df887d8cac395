"""Findings by cause."""

from __future__ import annotations

import pytest
from check_outcomes import outcome_of

from pytest_mistral_lora.conformance.finding import RULES, Finding, rest_of_findings
from pytest_mistral_lora.conformance.groups import MOST_CAUSES, MOST_NAMES, FindingGroups, group_findings, listed_names
from pytest_mistral_lora.places import NOWHERE, NamedSource, Place

ROWS = [Place.of("rows.jsonl", number) for number in range(10)]


def test_the_simplest_row_stands_for_its_cause() -> None:
    causes = FindingGroups()
    for name, messages in (("a", 4), ("b", 2), ("c", 6)):
        row = '{"role": 1}' * messages
        causes.add(Finding("ML547", f"{messages} tokens", ROWS[messages], row=row, shape="s"), f"t::mask::{name}")
    [cause] = causes
    assert (cause.check, cause.count) == ("t::mask::b", 3)
    assert cause.text(80).splitlines()[-1] == "and 2 more like it: t::mask: a, c"


def test_findings_without_tokens_are_told_apart_by_their_file_and_their_words() -> None:
    causes = FindingGroups()
    for file, line, found in (
        ("a.jsonl", 1, "'bot'"),
        ("a.jsonl", 9, "'bot'"),
        ("b.jsonl", 1, "'bot'"),
        ("a.jsonl", 1, "5"),
    ):
        place = Place.of(file, line) / "messages" / line / "role"
        causes.add(Finding("ML601", found, place), "check")
    assert [cause.count for cause in causes] == [2, 1, 1]


def test_places_are_sorted_as_numbers() -> None:
    causes = FindingGroups()
    for number in (3, 11, 10, 9, 2):
        place = Place(NamedSource("train_dataset", is_value=True), number + 1)
        causes.add(Finding("ML547", "x", place, shape="the same"), "check", place)
    [cause] = causes
    others = [f"train_dataset[{number}]" for number in (2, 9, 10, 11)]
    assert cause.to_json()["others"] == others
    assert cause.text(120).splitlines()[-1] == f"and 4 more like it: {', '.join(others)}"


def test_an_effect_is_counted_by_its_cause_which_comes_first() -> None:
    causes = FindingGroups()
    found = [
        Finding("ML543", "another fault", ROWS[1]),
        Finding("ML533", "a turn is lost", ROWS[1], more=14, effect_of="ML442"),
        Finding("ML521", "BOS is missing", ROWS[1], effect_of="ML442"),
        Finding("ML442", "the template", Place.of("processing_class")),
    ]
    for finding in found:
        causes.add(finding, "target::subject::case")
    assert [(cause.simplest.rule, cause.total) for cause in causes] == [("ML442", 17), ("ML543", 1)]
    standing = causes.standing(found)
    assert [finding.rule for finding in standing] == ["ML442", "ML543"]
    assert standing[0].covers == (("ML521", 1), ("ML533", 15))
    assert next(iter(causes)).to_json()["covers"] == [["ML521", 1], ["ML533", 15]]
    assert "ML521 (1), ML533 (15)" in next(iter(causes)).text(80)


def test_an_effect_without_its_cause_stands_for_itself() -> None:
    causes = FindingGroups()
    found = [Finding("ML533", f"{n} turns", ROWS[1], effect_of="ML442") for n in (1, 2)]
    for finding in found:
        causes.add(finding, "target::subject::case")
    assert [(cause.simplest.rule, cause.total) for cause in causes] == [("ML533", 2)]
    assert causes.standing(found) == found


def test_an_error_stands_for_the_notes_of_its_cause() -> None:
    causes = FindingGroups()
    causes.add(Finding("ML628", "marked up", ROWS[1], row="{}"), "check")
    causes.add(Finding("ML628", "marked up", ROWS[2], row='{"messages": []}', severity="error"), "check")
    causes.add(Finding("ML628", "marked up", ROWS[3], row="{}"), "check")
    [cause] = causes
    assert (cause.simplest.severity, cause.simplest.place, cause.count) == ("error", ROWS[2], 3)


def test_notes_come_after_errors() -> None:
    causes = FindingGroups()
    for rule in ("ML227", "ML004"):
        causes.add(Finding(rule, "found"), "check")
    assert [cause.simplest.rule for cause in causes] == ["ML004", "ML227"]


def test_findings_that_are_only_counted_are_counted_with_their_rule() -> None:
    causes = FindingGroups()
    causes.add(Finding("ML547", "a", ROWS[1]), "check", ROWS[1])
    causes.add(rest_of_findings("ML547", 40), "check")
    [cause] = causes
    assert cause.count == 41
    assert cause.text(80).splitlines()[-1] == "and 40 more like it: 40 that are only counted"


def test_a_file_of_any_length_keeps_a_bounded_number_of_findings() -> None:
    causes = FindingGroups()
    for number in range(3 * MOST_NAMES):
        causes.add(Finding("ML547", "x", shape="the same"), "check", f"rows.jsonl:{number}")
        causes.add(Finding("ML534", "x", shape=str(number)), "check", f"rows.jsonl:{number}")
    same, *others = causes
    assert (same.count, len(same.others)) == (3 * MOST_NAMES, MOST_NAMES)
    assert len(others) == MOST_CAUSES
    assert sum(one.count for one in others) == 3 * MOST_NAMES


def test_names_are_listed_in_short() -> None:
    rows = [Place.of("rows.jsonl", number) / "messages" / 1 / "role" for number in (3, 1, 2, 7)]
    assert listed_names(["t::mask::b", *rows, "t::mask::a"]) == ["t::mask: a, b", "rows.jsonl:1-3, 7"]
    assert listed_names([f"t::mask::{n:03}x" for n in range(400)])[1:] == ["… and 233 more"]
    assert listed_names([Place.of("rows.jsonl", n) for n in range(2, 2000, 2)])[1:] == ["… and 788 more"]


def test_one_fault_in_each_tensor_is_one_cause() -> None:
    names = [f"model.layers.{n}.self_attn.{kind}_proj.lora_B.weight" for n in range(32) for kind in "qkvo"]
    found = [Finding("ML403", f"{name} is zero: this layer learned nothing", Place.of("lora-out/x")) for name in names]
    [cause] = group_findings([outcome_of("lora-out::adapter::x", *found)])
    assert cause.count == 128
    assert "model.layers.0.self_attn.o_proj.lora_B.weight" in cause.text(120)
    assert "… and 1" in cause.text(120)


def test_texts_of_rows_are_not_part_of_a_cause_and_keys_of_a_file_are() -> None:
    rows = [Finding("ML624", f"the text has '{text}' as letters", ROWS[int(text)] / "x") for text in ("1", "2")]
    file = Place.of("adapter_config.json")
    keys = [Finding("ML409", f"target_modules has '{key}'", file) for key in ("kproj", "vproj")]
    assert len({one.cause for one in rows}) == 1
    assert len({one.cause for one in keys}) == 2


@pytest.mark.parametrize(
    ("found", "place", "headline"),
    [
        (
            "'usr'",
            ROWS[1] / "messages" / 0 / "role",
            "ML601 messages[0].role: 'usr' - rows.jsonl:1, messages[0].role",
        ),
        (
            "5",
            ROWS[1] / "messages" / 0 / "role",
            "ML601 messages[0].role: 5 - rows.jsonl:1, messages[0].role",
        ),
        ("None", NOWHERE, f"ML601 None: {RULES['ML601'].title}"),
        ("no messages", ROWS[1], "ML601 no messages - rows.jsonl:1"),
        ("'a' and 'b'", ROWS[1] / "x", "ML601 'a' and 'b' - rows.jsonl:1, x"),
    ],
)
def test_a_headline_is_never_a_bare_value(found: str, place: Place, headline: str) -> None:
    groups = FindingGroups()
    groups.add(Finding("ML601", found, place), "check")
    [cause] = groups
    assert cause.headline() == headline
