"""Faults of whole files: each is counted with its examples, and rows about such faults are none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dataset_recipes import facts, found, make_target, said, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.dataset.checks import dataset_results, file_results
from pytest_mistral_lora.conformance.dataset.file_faults import Bound, faulty_rows, file_faults
from pytest_mistral_lora.conformance.dataset.file_signs import FileSigns
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.conformance.row_pass import JudgedFiles, JudgedRecord
from pytest_mistral_lora.conformance.row_table import JudgedTable
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.strategies import hostile_text

ROOT = Path(__file__).parents[2]
# the lengths of pairs are in test_dataset_pairs.py, and the signs that every row has in test_whole_file_signs.py
ELSEWHERE = {"ML659", *(f"ML{number}" for number in range(661, 670))}
RULES_OF_FILES = {rule.id for rule in RULES.of("dataset", "statistics")} - ELSEWHERE


def signs_of(*data: dict[str, Any]) -> dict[str, int]:
    """Return the number of rows that show each sign."""
    found, encoded = FileSigns(), EncodedRow((), (), ())
    for number, row in enumerate(data, start=1):
        found.note(JudgedRecord(Place.of("rows.jsonl", number), (parse_row(row),), (encoded,), (encoded,)))
    return {name: evidence.rows for (_, name), evidence in found.signs.items() if name != "no_system_prompt"}


@pytest.mark.parametrize(
    ("sign", "question", "answer"),
    [
        ("decoded_wrongly", "Où?", "Voilà la rÃ©ponse."),
        ("decoded_wrongly", "Why?", "It\u2019s so.".encode().decode("cp1252").encode().decode("cp1252")),
        ("decoded_wrongly", "Wie?", "Schön 😀".encode().decode("cp1252")),
        ("decoded_wrongly", "Where?", "你好".encode().decode("latin-1")),
        ("decoded_wrongly", "Wo?", "MÃ¼nchen, SÃ£o Paulo"),
        ("letters_lost", "Why?", "It\ufffds so."),
        ("html_entities", "What?", "Bed &amp; breakfast."),
        ("html_entities", "What?", "The &quot;old&quot; one."),
        ("html_tags", "What?", "<p>The <b>old</b> one.</p>"),
        ("html_tags", "<p>What is it?</p>", "<p>The old one.</p>"),
        ("html_tags", "What?", '<div class="markdown prose">The old one.</div>\n'),
        ("html_tags", "What?", "The old one.<br/>Or the new one."),
        ("message_unfilled", " {{ prompt }}\n", "Yes."),
        ("message_unfilled", "What?", "<<answer>>"),
        ("field_unfilled", "Answer by this: {context}", "Yes."),
        ("name_unfilled", "Who are you?", "I am {assistant_name}."),
        ("media_unfilled", "What is on <image> this? <image>", "A cat."),
        ("media_unfilled", "<image_1>\nWhat is this?", "A cat."),
        ("rendered", "<s>[INST] What? [/INST]", "Yes."),
        ("rendered", "What?", "Yes. </s>\n"),
        ("missing_value", "NaN", "What do you mean?"),
        ("missing_value", "Summarise the text.\nInput: nan", "What do you mean?"),
        ("missing_value", "Which town?", "undefined"),
        ("missing_value", "### Instruction:\nSummarise the text.\n\n### Input:\nnan\n\n### Response:", "Which?"),
        ("none_as_answer", "Which town?", "N/A"),
        # what the question is about allows it once
        ("empty_cell", "Which town is not far?", "nan"),
        ("empty_cell", "Write a function that sorts.\nInput: nan", "def f(): ..."),
        ("invisible", "Where?", "By\u200bthe\u200btown."),
        ("invisible", "Where?", "By\u200b the \u2060town."),
        ("calls_as_text", "Warm?", '```json\n[{"name": "weather", "arguments": {"city": "Rome"}}]\n```'),
        ("calls_as_text", "Warm?", "Thought: I must look.\nAction: weather\nAction Input: Rome"),
        ("calls_as_text", "Warm?", '<functioncall> {"name": "weather"}'),
    ],
)
def test_a_row_shows_a_sign(sign: str, question: str, answer: str) -> None:
    assert signs_of(said(question, answer)) == {sign: 1}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Qu'est-ce ?", "Un «CAFÉ», «été», «É», et ça… NÃO, «MAÇÃ», MAÇÃ…, Â, Ä… ÄÖÜ"),
        ("What is mojibake?", 'It is "cafÃ©" for "café", or `â€™`.'),
        ("How do I write & in HTML?", "Write &amp; there, and don&#39;t forget it."),
        ("Link?", "It is https://example.org/?a=1&amp;b=2"),
        ("R&D?", "AT&T, R&D; a && b"),
        # the model reads it, and learns to write none
        ("<p>What is it?</p>", "The old one."),
        ("Bed &amp; breakfast?", "Bed & breakfast."),
        ("Make a web page that greets.", "<div>Hello.</div>"),
        ("Which tag ends a line?", "It is <br>."),
        ("What is a <p>?", "A name in angle brackets, as in <p> and <div>."),
        ("Break a line?", "Write `<br>` there, or:\n```\n<p>a</p>\n```"),
        ("Is a < b and b > c?", "If a<b>c is a chain, yes."),
        ("Python?", 'Write f"Hello {name}", or `{input}`.'),
        ("JSON?", '{"input": 1, "name": {"output": 2}}'),
        ("LaTeX?", r"\frac{x}{y}, \text{name}s, {a, b}"),
        ("An <image> tag?", "Use <image> in SVG, or <name>."),
        ("What does </s> mean?", "It ends an answer: </s> is EOS."),
        ("What does print(f()) show if f has no return?", "None"),
        ("What is `typeof x`?", "undefined"),
        ("Which country? Answer N/A if the text names none.", "N/A"),
        ("What is 0 / 0 in JavaScript?", "NaN"),
        ("Any allergies?", "Do you have some?"),
        ("Who?", '{"name": "Ann", "age": 3}'),
        ("Plan?", "Action: none is needed."),
        ("What is the mean of an empty column in pandas?", "nan"),
        ("What is log(-1) in numpy?", "nan"),
        # emoji, scripts without spaces or with joiners, the mark of a file's beginning, and rows about them
        ("Who?", "A family: \U0001f468\u200d\U0001f469\u200d\U0001f467."),
        ("ใคร", "สวัสดี\u200bครับ"),
        ("\u06a9\u062c\u0627?", "\u0645\u06cc\u200c\u062e\u0648"),
        ("\ufeffWho?", "Ann."),
        ("How do I remove zero-width spaces?", "Search a\u200bb for them."),
    ],
)
def test_a_row_about_a_sign_shows_none(question: str, answer: str) -> None:
    assert signs_of(said(question, answer)) == {}


def called(arguments: object, result: str = "mild", question: str = "How is it there?") -> dict[str, Any]:
    """Return a row with a call and its result."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    answer, *rest = {"role": "assistant", "tool_calls": [call]}, said("", "It is mild.")["messages"][1]
    returned = {"role": "tool", "tool_call_id": "abcdefghi", "content": result}
    return {"messages": [{"role": "user", "content": question}, answer, returned, *rest], "tools": []}


@pytest.mark.parametrize(
    ("sign", "row"),
    [
        ("decoded_wrongly", called({"city": "MÃ¼nchen"})),
        ("decoded_wrongly", called(json.dumps({"where": {"cities": ["Rome", "MÃ¼nchen"]}}))),
        ("decoded_wrongly", called({"city": "Rome"}, "MÃ¼nchen is mild.")),
        ("decoded_wrongly", called({"city": "Rome"}, '{"near": ["MÃ¼nchen"]}')),
        ("invisible", called({"city": "New\u200bYork"})),
        ("invisible", called({"city": "Rome"}, "mild\u200band dry")),
        ("missing_value", called({"city": "nan"})),
        ("empty_cell", called({"city": "Rome"}, "nan")),
    ],
)
def test_a_text_for_a_tool_or_of_it_shows_a_sign(sign: str, row: dict[str, Any]) -> None:
    assert signs_of(row) == {sign: 1, "calls": 1}


@pytest.mark.parametrize(
    "row",
    [
        called({"city": "Rome", "day": None, "unit": "none"}),
        called({"city": "Rome"}, "None"),
        called({"city": "Rome"}, "null"),
        # keys are those of a program, and what the user wrote is asked for
        called({"mÃ¼": 1}),
        called({"city": "MÃ¼nchen"}, question="Is `MÃ¼nchen` a town?"),
        called({"city": "nan"}, question="What if the city is NaN?"),
        called({"code": "float('nan')"}),
        called("not JSON: MÃ¼nchen"),
    ],
)
def test_a_sound_text_for_a_tool_or_of_it_shows_none(row: dict[str, Any]) -> None:
    assert signs_of(row) == {"calls": 1}


@pytest.mark.parametrize("unit", ["\n", "\n ", "[\n", "```\n", '[{"name"', "Action: a\n"])
def test_long_answers_near_a_call_take_no_time(unit: str) -> None:
    answer = unit * 15_000 + '"name"'
    start = time.process_time()
    signs_of(said("Hi", answer))
    assert time.process_time() - start < 3


def test_a_turn_of_a_dialogue_may_be_the_word_none() -> None:
    assert signs_of(said("Hello", "Any allergies?", "None", "Good.")) == {}


def distinct(answer: Callable[[int], str], count: int = 100, question: str = "What is thing {}?") -> list[Any]:
    return [said(question.format(number), answer(number)) for number in range(count)]


PROSE = "It is a thing of this house. It stands beside number {} since the owner brought it here from the old town by "
PROSE += "train and by ship, because he could not leave it there in the rain."


def turned(number: int) -> str:
    """Return prose in another order of its words, so that a cut falls anywhere."""
    first, *words = PROSE.format(number + 100).split()
    return " ".join([first, "is.", *words[number % len(words) :], *words])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # a refusal in one of twenty rows, and a label in nine of ten
        (lambda number: PROSE.format(number) if number % 20 else "Sorry, I cannot help you with that question.", {}),
        (lambda number: "no" if number % 10 else "yes", {}),
        (lambda number: "no" if number % 50 else "yes", {}),
        (lambda number: "no", {}),
        (lambda number: PROSE if number % 4 == 0 else PROSE.format(number), {"ML644": "note"}),
        (lambda number: PROSE if number else "It is a door.", {"ML644": "note"}),
        # what a file is about, and an error message
        (lambda number: PROSE, {}),
        (lambda number: "Error: the server has been overloaded, please try again in some minutes.", {"ML644": "note"}),
        # texts of one length, but whole ones, and texts of all lengths, that end anywhere
        (lambda number: PROSE.format(number + 100), {}),
        (lambda number: PROSE.format(number + 100)[: 125 + number // 2], {}),
        (lambda number: f"{number + 100:x}" * 100, {}),
        (lambda number: turned(number)[: 100 + 30 * (number % 3)], {"ML645": "note"}),
        # one form, which ends with a value
        (lambda number: f"{PROSE} Its number is {number + 100}", {}),
        (lambda number: PROSE.format(number + 100)[: 130 if number < 4 else 100], {}),
    ],
)
def test_the_share_of_the_rows_decides(answer: Callable[[int], str], expected: dict[str, str], tmp_path: Path) -> None:
    # a tokenizer without a chat template: nothing is compared
    tokenizer = CheckpointTokenizer(shipped_tokenizer("spm-v3"))
    results = file_results(write_rows(tmp_path / "rows.jsonl", distinct(answer)), tokenizer)
    seen = {one.rule: one.severity for one in found(results, *RULES_OF_FILES)}
    assert seen == expected


def test_a_finding_has_its_count_and_three_examples_of_its_own_file(tmp_path: Path) -> None:
    broken = distinct(lambda number: f"Voilà {number}." if number % 2 else f"VoilÃ\xa0 {number}.", 20)
    target = make_target(tmp_path, distinct("Answer {}.".format, 50), broken)
    results = dataset_results(target)
    [finding] = found(results, "ML636")
    path = tmp_path / "held-out.jsonl"
    assert (str(finding.place), finding.severity) == (f"{path}:1", "note")
    assert "in 10 of 20 rows (50.0%)" in finding.found
    assert [line.partition(",")[0] for line in finding.detail.splitlines()] == [f"{path}:{line}" for line in (1, 3, 5)]
    assert facts(results)["texts"]["decoded_wrongly"] == {
        "rows": 10,
        "examples": [f"{path}:{line}" for line in (1, 3, 5)],
    }


def test_equal_rows_are_no_rows_with_the_same_answer(tmp_path: Path) -> None:
    results = dataset_results(make_target(tmp_path, [*distinct("Answer {}.".format, 10), *[said("a", PROSE)] * 40]))
    assert {one.rule for one in found(results)} == {"ML608"}


def test_prompts_of_several_kinds_are_no_lost_prompt(tmp_path: Path) -> None:
    data = [said(f"What is {n}?", f"Thing {n}.", system=f"You are {n % 3}." * (n % 2)) for n in range(100)]
    assert found(dataset_results(make_target(tmp_path, data)), *RULES_OF_FILES) == []


def test_check_shows_signs_last_and_stats_the_rows(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in distinct("I am {{{{name}}}}, number {}.".format, 30)))
    assert main(["check", str(path), "--tokenizer", "spm-v3"]) == 0
    assert "ML638" in capsys.readouterr().out
    assert main(["stats", str(path), "--tokenizer", "spm-v3"]) == 0
    assert "name unfilled: 30, first rows.jsonl:1" in " ".join(capsys.readouterr().out.split())


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(hostile_text(), min_size=40, max_size=50))
def test_hostile_texts_are_no_fault_of_their_file(texts: list[str]) -> None:
    counts = signs_of(*(said(f"{number}: {text}", text or "-") for number, text in enumerate(texts)))
    errors = [fault.name for fault in file_faults() if fault.severity(counts.get(fault.name, 0), len(texts)) == "error"]
    assert errors == []


def in_words(bound: Bound | None, unit: str) -> str:
    if bound is None:
        return "-"
    rows = f"{bound.rows} {unit}{'s' * (bound.rows > 1)}"
    share = f"{'more than ' * bound.is_exceeded}{bound.share:.1%}".replace(".0%", "%")
    return f"{rows}, {share}" if bound.share else rows


@pytest.mark.parametrize(
    ("bound", "rows", "of", "is_reached"),
    [
        (Bound(5, 0.05), 5, 100, True),
        (Bound(5, 0.05), 4, 20, False),
        (Bound(5, 0.05), 5, 101, False),
        (Bound(2, 0.05, is_exceeded=True), 2, 39, True),
        (Bound(2, 0.05, is_exceeded=True), 2, 40, False),
        (Bound(2, 0.05, is_exceeded=True), 1, 1, False),
        (Bound(1, 0), 1, 1_000_000, True),
        (Bound(1, 0), 0, 1_000_000, False),
    ],
)
def test_a_bound_is_reached_by_the_number_and_the_share(bound: Bound, rows: int, of: int, is_reached: bool) -> None:
    assert bound.is_reached(rows, of) is is_reached


def test_the_page_has_each_fault_with_its_bounds() -> None:
    page = (ROOT / "docs" / "stats.md").read_text(encoding="utf-8")
    for fault in file_faults():
        link = f"[{fault.rule}](rules.md#{fault.rule.lower()})"
        bounds = (in_words(bound, fault.unit) for bound in (fault.note, fault.error))
        cells = (fault.name.replace("_", " "), fault.sign, link, *bounds)
        assert f"| {' | '.join(cells)} |" in page


def test_each_fault_is_a_rule_of_the_statistics() -> None:
    assert {fault.rule for fault in file_faults()} == RULES_OF_FILES
    assert list(faulty_rows(FileSigns(), JudgedFiles((), JudgedTable(), ()))) == []
