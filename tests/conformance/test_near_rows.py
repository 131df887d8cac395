"""Held-out rows of which nearly the same is trained on: a note; rows that only look alike give none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_recipes import make_target, said, write_rows

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.conformance.dataset import repeats
from pytest_mistral_lora.conformance.dataset.checks import dataset_results
from pytest_mistral_lora.conformance.dataset.repeats import near_rows, row_sketch
from pytest_mistral_lora.extras import MissingExtraError

QUESTION = (
    "The train to the coast was cancelled because of snow on the line, and my ticket is for this train alone. "
    "Which trains may I take instead, and do I have to ask somebody at the station first?"
)
ANSWER = (
    "You may take any train to the coast on the same day or the day after, and you need not ask anybody first. "
    "Keep your ticket, and show the message about the snow if a conductor wants to see a reason."
)
SYSTEM = "You work for the railway. Answer in plain words, name the rule that applies, and never promise a refund. " * 4
CHINESE = (
    "因为下雪,去海边的火车被取消了,而我的票只能乘坐这趟车。请问我可以改乘哪些列车,需要先去车站询问工作人员吗?",
    "您可以在当天或第二天乘坐任何一趟开往海边的列车,不需要事先询问。请保留好车票,如果列车员要求,请出示通知。",
)


def is_near(one: dict[str, Any], other: dict[str, Any]) -> bool:
    sketches = bytearray().join(row_sketch(parse_row(row)) for row in (one, other))
    return bool(near_rows(sketches, np.array([False, True]), np.array([True, False])))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (said(QUESTION, ANSWER), said(QUESTION.replace("station", "counter"), ANSWER)),
        (said(QUESTION, ANSWER), said(QUESTION, ANSWER.replace("message", "notice"))),
        (said(QUESTION, ANSWER), said(f"Hello, {QUESTION}", f"{ANSWER} Have a good trip!")),
        (said(QUESTION, ANSWER), said(QUESTION.upper().replace("SNOW", "RAIN"), ANSWER.replace(" ", "  "))),
        (said(QUESTION, ANSWER), said(QUESTION.replace("snow", "schnee"), ANSWER, system=SYSTEM)),
        (said(QUESTION, "Any."), said(QUESTION.replace("snow", "ice"), "any")),
        (said(*CHINESE), said(CHINESE[0].replace("下雪", "下雨"), CHINESE[1])),
    ],
    ids=["question", "answer", "greeting", "case-and-spaces", "system-prompt", "short-answer", "Chinese"],
)
def test_rows_with_a_few_other_words_are_near(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert is_near(one, other)


DOCUMENT = " ".join([ANSWER, QUESTION] * 2)
FORM = "A farmer has {} cows and {} goats on a hill, and sells a third of all the animals at the market of the village."
SHOWN = "There are {} animals, and a third of them is {}; this is the number that the farmer sells at the market."
REFUSAL = "I am sorry, but I cannot help with this request, because it could do harm to you or to other people nearby."


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (said("What is snow?", "Frozen water.", system=SYSTEM), said("What is rain?", "Water.", system=SYSTEM)),
        (said(FORM.format(20, 10), SHOWN.format(30, 10)), said(FORM.format(40, 20), SHOWN.format(60, 20))),
        (said("Is snow white?", "Yes."), said("Is ice cold?", "Yes.")),
        (said("Is snow white?", "Yes."), said("Is snow red?", "No.")),
        (said("How do I pick a lock?", REFUSAL), said("Which poison has no taste?", REFUSAL)),
        (said(f"{DOCUMENT}\n\nWhat fell?", ANSWER), said(f"{DOCUMENT}\n\nWho may ask?", QUESTION)),
        (said(QUESTION, "Any train on this day."), said(QUESTION, "None at all, sadly.")),
        (said("Hello", "Hi!", system=SYSTEM), said("Hello", "Hi!", system="Be terse.")),
        (said(QUESTION, ANSWER, "Thanks", "Bye"), said(QUESTION, ANSWER)),
        (said("a", "b"), said("c", "d")),
    ],
    ids=["system-prompt", "numbers", "yes", "no", "refusal", "document", "answer", "greeting", "turns", "short"],
)
def test_other_rows_are_not_near(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert not is_near(one, other)


def test_each_row_finds_the_first_that_is_near_among_many() -> None:
    plain = [said(f"{QUESTION} I wrote at {number}.", ANSWER) for number in range(60)]
    others = [said(f"{QUESTION.replace('coast', 'lake')} I wrote at {number}.", ANSWER) for number in range(60)]
    sketches = bytearray().join(row_sketch(parse_row(row)) for row in [*plain, *others, *plain])
    held_out = np.arange(180) >= 60
    found = near_rows(sketches, held_out, ~held_out)
    assert {row: other for row, (other, _) in found.items()} == {row: row % 60 for row in range(60, 180)}
    everything = np.ones(180, bool)
    assert {row: other for row, (other, _) in near_rows(sketches, everything, everything).items()} == {
        row: row % 60 for row in range(60, 180)
    }


def test_a_row_is_reported_once_and_counted(tmp_path: Path) -> None:
    near = said(QUESTION.replace("snow", "ice"), ANSWER)
    trained = [said(QUESTION, ANSWER), said("a", "b"), said("A!", "b."), near, said("a", "b")]
    held_out = [said("a", "b"), said("A", "B"), said(QUESTION.replace("coast", "lake"), ANSWER), said("c", "d")]
    results = dataset_results(make_target(tmp_path, trained, held_out))
    places = {
        finding.rule: str(finding.place).rpartition(":")[2] for one in results.values() for finding in one.findings
    }
    assert places.items() >= {"ML608": "5", "ML610": "1", "ML632": "2", "ML633": "3"}.items()
    [finding] = results["no-near-leakage"].findings
    assert finding.severity == "note"
    assert [str(place) for place in finding.others] == [f"{tmp_path / 'rows.jsonl'}:1"]
    assert dict(results["statistics"].facts)["repeats"] == {
        "within_a_side": {"same": 1, "another_form": 2, "near": 1},
        "across_the_split": {"same": 1, "another_form": 1, "near": 1},
    }


def test_without_the_library_the_check_names_it_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "is_installed", lambda name: False)
    results = dataset_results(make_target(tmp_path, [said(QUESTION, ANSWER)], [said("a", "b")]))
    missing = {case: result.not_checked for case, result in results.items() if result.not_checked}
    assert missing == {"no-near-leakage": str(MissingExtraError("rensa"))}
    assert dict(results["statistics"].facts)["repeats"]["within_a_side"]["near"] is None
    results = dataset_results(make_target(tmp_path, [said(QUESTION, ANSWER)]))
    assert not any(result.not_checked for result in results.values())


def test_the_library_is_imported_only_if_it_is_used(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [said("a", "b")])
    code = f"""
import sys
from pathlib import Path
from pytest_mistral_lora.chat.encoded import Policy
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.conformance.dataset.report import judge_shard
from pytest_mistral_lora.conformance.dataset.rows import ScanPlan
plan = ScanPlan(shipped_tokenizer("spm-v3"), "mistral-common", Policy(99), 0.0, False)
print(len(judge_shard(plan, 0, DataFile(Path({str(file)!r}), False)).table), "rensa" in sys.modules)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "1 False\n"
