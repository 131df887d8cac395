"""Results of parts of a dataset, however it is divided and in whatever order they come, are the result of one pass."""

from __future__ import annotations

import copy
import itertools
import pickle
from array import array
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from dataset_recipes import said, v3, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_mistral_lora.chat.encoded import Policy
from pytest_mistral_lora.chat.reading.chunks import DataFile, chunks
from pytest_mistral_lora.conformance.bounded_findings import SHOWN
from pytest_mistral_lora.conformance.dataset.decoded_answers import UnjudgedRows
from pytest_mistral_lora.conformance.dataset.lengths import percentile, spread
from pytest_mistral_lora.conformance.dataset.report import judge_shard, report, scan
from pytest_mistral_lora.conformance.dataset.rows import DatasetPass, RowJudge, ScanPlan
from pytest_mistral_lora.conformance.dataset.texts import main_script
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.places import Place

PLAN = ScanPlan(v3().path, "mistral-common", Policy(60, "right"), 0.2, compares=True, sketches=True)
CALL = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
LONG = [
    f"Which {word} may I take from the hill to the lake on a day with much snow?" for word in ("way", "road", "bus")
]
SPIDER = ("How many legs has a spider?", "Eight.", "And an ant?", "Six.")
WORDS = "and more words of an old house near the wide river that people call a home"
ROWS: list[Any] = [
    *(said(f"Question {number % 7}?", f"Answer {number % 9}.") for number in range(SHOWN + 6)),
    said("QUESTION 3 ?", "answer 3"),
    said(*SPIDER),
    said("Count.", "one " * 80),
    "{",
    "",
    said("a [INST] b", "c"),
    said("spaces at the end", "yes  "),
    said("Сколько будет два плюс два?", "Четыре."),
    {"messages": [{"role": "user", "content": "Rome?"}, {"role": "assistant", "tool_calls": [CALL]}]},
    said("x", "y", "z"),
    said("Where?", "Voilà.".encode().decode("latin-1")),
    said("And where?", "Lå.".encode().decode("latin-1"), system="Be brief."),
    said("Go on.", f"It is so. {'And it goes on ' * 3}"),
    *(said(one, LONG[0]) for one in LONG),
    # what the share of rows in a file decides
    *(said(f"Spell {number}.", f"caf\\u00e9 number {number}") for number in range(4)),
    *(said(f"Go to {number}.", f"### Assistant: on my way to {number}") for number in range(5)),
    *(
        said(f"Tell {number}.", f"It is {number}. {' '.join((WORDS.split() * 4)[number:])}"[:150])
        for number in range(6)
    ),
    *(said(f"Question {number}?", f"Answer {number}.", system="Be brief.") for number in range(20, 42)),
]


@cache
def judge() -> RowJudge:
    return RowJudge(PLAN, v3())


def results(found: DatasetPass, files: list[DataFile]) -> dict[str, Result]:
    return report(copy.deepcopy(found), files, PLAN, recipe=Place.of("recipe.yaml"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[DataFile]:
    folder = tmp_path_factory.mktemp("rows")
    paths = [write_rows(folder / f"{name}.jsonl", rows) for name, rows in {"b": ROWS, "a": ROWS[20:30]}.items()]
    held_out = write_rows(
        folder / "held-out.jsonl",
        [*ROWS[5:8], said(LONG[1] + " Thanks.", LONG[0]), said("how many legs has a SPIDER", *SPIDER[1:])],
    )
    return [*(DataFile(path, False) for path in paths), DataFile(held_out, True)]


@pytest.fixture(scope="module")
def expected(files: list[DataFile]) -> dict[str, Result]:
    return results(scan(PLAN, files, tokenizer=v3(), processes=1), files)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_parts_in_any_order_are_one_pass(
    data: st.DataObject, files: list[DataFile], expected: dict[str, Result]
) -> None:
    parts = []
    for chunk in chunks(files, lambda error: pytest.fail(str(error))):
        owners = data.draw(st.lists(st.integers(0, 3), min_size=len(chunk.lines), max_size=len(chunk.lines)))
        for part in sorted(set(owners)):
            lines = [line for line, owner in zip(chunk.lines, owners, strict=True) if owner == part]
            parts.append(judge().judge_chunk(replace(chunk, lines=lines)))
    parts = data.draw(st.permutations(parts))
    while len(parts) > 1:
        first = data.draw(st.integers(0, len(parts) - 2))
        other = parts.pop(first + 1)
        parts[first].extend(other)
    assert results(parts[0], files) == expected


def test_the_parts_show_every_kind_of_finding_that_a_merge_could_spoil(expected: dict[str, Result]) -> None:
    rules = {finding.rule for result in expected.values() for finding in result.findings}
    assert rules >= {"ML601", "ML608", "ML609", "ML610", "ML611", "ML612", "ML618", "ML620", "ML632", "ML633", "ML636"}
    assert rules >= {"ML624", "ML628", "ML645", "ML646", "ML648"}
    facts = dict(expected["statistics"].facts)
    assert dict(expected["backends-agree"].facts)["deviations"]
    assert facts["texts"]["decoded_wrongly"]["rows"] == 2
    assert facts["texts"]["same_short_answer"]["rows"] > 1
    assert (facts["rows_refused"], facts["tokens"]["max"], facts["longest_row"][-10:]) == (3, 60, "b.jsonl:29")


def test_a_shard_is_a_file_that_another_process_reads(
    files: list[DataFile], expected: dict[str, Result], tmp_path: Path
) -> None:
    work = pickle.loads(pickle.dumps(judge_shard))
    merged = DatasetPass()
    for index, file in reversed(list(enumerate(files))):
        plan, index, file = pickle.loads(pickle.dumps((PLAN, index, file)))
        merged.extend(pickle.loads(pickle.dumps(work(plan, index, file))))
    assert results(merged, files) == expected
    lost = [*files, DataFile(tmp_path / "lost.jsonl", False), DataFile(tmp_path / "also-lost.jsonl", False)]
    for index in (4, 3):
        merged.extend(work(PLAN, index, lost[index]))
    assert results(merged, lost) == results(scan(PLAN, lost, tokenizer=v3(), processes=1), lost)


def test_a_row_with_one_answer_takes_as_many_bytes_as_the_page_tells(tmp_path: Path) -> None:
    file = DataFile(
        write_rows(tmp_path / "rows.jsonl", [said(f"What is {one}?", "long " * one) for one in range(1, 50)])
    )
    found = judge_shard(replace(PLAN, policy=Policy(999), compares=False), 0, file)
    sizes = {name: memoryview(column).nbytes / len(found.table) for name, column in vars(found.table).items()}
    assert (sizes.pop("sketches"), sum(sizes.values()), len(found.table)) == (64, 66, 49)
    # of the states of rules, one has a column, and no other grows with the rows
    values = [value for state in found.states.by_name.values() for value in vars(state).values()]
    [column] = [value for value in values if isinstance(value, array | bytearray | list)]
    assert memoryview(column).nbytes / len(found.table) == 4


def test_the_reason_of_the_first_row_is_printed_in_any_order_of_parts() -> None:
    for order in itertools.permutations([(7, "no grammar"), (3, "no schema"), (9, "no grammar")]):
        found = UnjudgedRows()
        for at, reason in order:
            part = UnjudgedRows()
            part.add(at, reason)
            found.extend(part)
        assert (found.rows, found.reason) == (3, "no schema")


@given(st.lists(st.integers(0, 50)), st.integers(0, 50))
def test_quantiles_of_counts_are_those_of_the_values(values: list[int], cut: int) -> None:
    counts: dict[int, int] = {}
    for value in [*values[cut:], *values[:cut]]:
        counts[value] = counts.get(value, 0) + 1
    ordered = sorted(values)
    for percent in (1, 50, 95, 100):
        at = next((value for value in ordered if 100 * sum(one <= value for one in values) >= percent * len(values)), 0)
        assert percentile(counts, percent) == at
    assert spread(counts)["total"] == sum(values)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Was ist ein Café?", "Latin"),
        ("\uff37\uff29\uff24\uff25", "Latin"),
        ("Сколько? x", "Cyrillic"),
        ("法国的首都是哪里?", "Han"),
        ("日本の首都はどこですか。", "Kana"),
        ("프랑스의 수도는?", "Hangul"),
        ("ما هي عاصمة فرنسا؟", "Arabic"),
        ("भारत", "Devanagari"),
        ("𐎠𐎡", "Old Persian"),
        ("1 + 2 = ?", "no letters"),
    ],
)
def test_the_script_of_a_row_is_that_of_most_of_its_letters(text: str, script: str) -> None:
    from pytest_mistral_lora.chat.kinds.conversation import parse_row

    assert main_script(parse_row(said(text, "4"))) == script
