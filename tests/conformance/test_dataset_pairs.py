"""Both sides of a preference pair are judged as rows: what holds for any answer, and what for a wanted one alone."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from dataset_recipes import facts, found, make_target, v3, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset_shards import CALL

from pytest_mistral_lora.chat.encoded import Policy
from pytest_mistral_lora.chat.reading.chunks import Chunk, DataFile
from pytest_mistral_lora.conformance.dataset.checks import dataset_results, dataset_statistics, file_results
from pytest_mistral_lora.conformance.dataset.report import judge_shard, report, scan
from pytest_mistral_lora.conformance.dataset.row_findings import ON_EVERY_ROW
from pytest_mistral_lora.conformance.dataset.rows import DatasetPass, RowJudge, ScanPlan
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.targets import DatasetTarget, Target
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.strategies import pairs


@functools.cache
def judge() -> RowJudge:
    return RowJudge(PLAN, v3())


PLAN = ScanPlan(v3().path, "mistral-common", Policy(10**6), 0.0, compares=True, sketches=True, alone=True)


def turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def a_pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    answers = {"chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}
    return {"prompt": [turn("user", prompt)], **answers, **more}


def rated(prompt: str, answer: str, *, label: bool) -> dict[str, Any]:
    return {"prompt": [turn("user", prompt)], "completion": [turn("assistant", answer)], "label": label}


def judged(folder: Path, *records: Any) -> dict[str, Result]:
    return file_results(write_rows(folder / "rows.jsonl", records), v3())


def sound(count: int) -> list[dict[str, Any]]:
    """Return pairs that share a prompt with others, as rankings do, with the longer answer on either side."""
    words = ("short", "somewhat longer, and with a reason", "longest of all, with a reason and with an example, too")
    return [
        a_pair(f"Question {n // 3}?", f"Answer {n}, {words[n % 3]}.", f"Reply {n}, {words[(n + n // 3) % 3]}.", score=n)
        for n in range(count)
    ]


def test_sound_pairs_break_no_rule(tmp_path: Path) -> None:
    results = judged(tmp_path, *sound(300), *(rated(f"Rate {n}?", f"Yes, {n}.", label=n % 2 == 0) for n in range(60)))
    assert found(results) == []
    figures = facts(results)
    assert figures["rows"] == 360
    assert figures["messages"] == 300 * 3 + 60 * 2
    assert {side: of_side["rows"] for side, of_side in figures["sides"].items()} == {
        "chosen": 300,
        "rejected": 300,
        "wanted": 30,
        "unwanted": 30,
    }


def test_a_fault_of_the_prompt_is_reported_once(tmp_path: Path) -> None:
    [finding] = found(judged(tmp_path, a_pair("Say it.[/INST] No.", "The end.", "Nothing.")))
    assert (finding.rule, str(finding.place)) == ("ML612", f"{tmp_path}/rows.jsonl:1, chosen")
    results = judged(tmp_path, {**a_pair("", "a", "b"), "prompt": [turn("tool", "1")]})
    [finding] = found(results)
    assert finding.rule == "ML601"
    assert facts(results)["rows_refused"] == 1


def test_a_fault_of_each_answer_is_reported_with_its_side(tmp_path: Path) -> None:
    results = judged(tmp_path, a_pair("Say it.", "a [INST] b", "c </s> d"))
    assert [str(finding.place).rpartition(", ")[2] for finding in found(results, "ML612")] == ["chosen", "rejected"]


@settings(max_examples=15)
@given(records=st.lists(pairs(tools=None), min_size=1, max_size=4))
def test_generated_pairs_break_no_law_of_pairs(records: list[dict[str, Any]]) -> None:
    lines = [(number, json.dumps(record).encode()) for number, record in enumerate(records, start=1)]
    found = judge().judge_chunk(Chunk(Place.of("pairs.jsonl"), 0, False, lines, 0))
    assert len(found.table) == len(records)
    assert list(found.findings.of("ML601", "ML655", "ML656", *ON_EVERY_ROW)) == []


LEGITIMATE = [
    ("caf\\u00e9 \\u4f60\\u597d", "ML624"),
    ("one.\\n\\nTwo. three\\nfour", "ML626"),
    ("<|im_start|>assistant\nNo.<|im_end|>", "ML628"),
    ("<think>\nHm.\n</think>\n\nNo.", "ML631"),
    ("It costs 5 \ufffd.", "ML617"),
    ("CafÃ© and naÃ¯ve", "ML636"),
    ("nan", "ML643"),
]


@pytest.mark.parametrize(("text", "rule"), LEGITIMATE, ids=[rule for _, rule in LEGITIMATE])
def test_an_answer_that_nobody_wants_may_be_bad(tmp_path: Path, text: str, rule: str) -> None:
    def rules(*records: Any) -> set[str]:
        results = file_results(write_rows(tmp_path / "rows.jsonl", records), v3())
        # they are of other lengths, and all the same
        return {finding.rule for finding in found(results)} - {"ML644", "ML659", "ML665"}

    records = [a_pair(f"Question {n}?", f"It is answer {n}.", text) for n in range(12)]
    assert rules(*records) == set()
    assert rules(*(rated(f"Question {n}?", text, label=False) for n in range(12))) == set()
    # the same texts are a fault of the answers that are wanted
    assert rule in rules(*({**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in records))
    assert rule in rules(*(rated(f"Question {n}?", text, label=True) for n in range(12)))


def test_a_prompt_of_an_unwanted_answer_is_judged(tmp_path: Path) -> None:
    rows = [rated(f"<|im_start|>user\nQuestion {n}?<|im_end|>", f"Answer {n}.", label=False) for n in range(4)]
    assert {finding.rule for finding in found(judged(tmp_path, *rows))} == {"ML628"}


def test_calls_of_an_unwanted_answer_keep_their_shape(tmp_path: Path) -> None:
    call = copy.deepcopy(CALL)
    call["id"] = "short"
    wrong = {**a_pair("Rome?", "It is mild.", ""), "rejected": [{"role": "assistant", "tool_calls": [call]}]}
    [finding] = found(judged(tmp_path, wrong))
    assert finding.rule == "ML601"
    assert str(finding.place).startswith(f"{tmp_path}/rows.jsonl:1, rejected")


def test_ids_and_labels_of_another_trainer_are_no_answers(tmp_path: Path) -> None:
    rows = [rated(f"Q {n}?", f"Answer {n}.", label=True) for n in range(3)]
    assert found(judged(tmp_path, *rows)) == []
    assert [finding.rule for finding in found(judged(tmp_path, {**rows[0], "input_ids": [1, 2]}))] == ["ML634"]


def test_pairs_of_one_prompt_are_no_repeated_prompts_but_equal_pairs_are(tmp_path: Path) -> None:
    records = sound(6)
    assert found(judged(tmp_path, *records)) == []
    again = records[0] | {"score": 7}
    assert {finding.rule for finding in found(judged(tmp_path, *records, again))} == {"ML608"}


def test_statistics_have_the_lengths_of_each_side_and_the_pairs_that_a_cut_makes_equal(tmp_path: Path) -> None:
    target = make_target(tmp_path, [])
    long = a_pair("word " * 700, "Yes.", "No.")
    path = write_rows(tmp_path / "pairs.jsonl", [*sound(4), long, a_pair("Same?", "Yes.", "Yes. ")])
    figures = dataset_statistics(DatasetTarget("pairs", path, judge=Target.of_loaded(v3())))
    assert figures["sides"]["chosen"]["rows"] == figures["sides"]["rejected"]["rows"] == 6
    assert figures["sides"]["chosen"]["answer_tokens"]["total"] > 0
    assert [(cut["max_length"], cut["pairs_made_equal"]) for cut in figures["cuts"]] == [(512, 1), (1024, 0)]
    results = dataset_results(target)
    assert "sides" not in facts(results)


def test_a_recipe_refuses_pairs_with_the_way_out(tmp_path: Path) -> None:
    target = make_target(tmp_path, [{"messages": [turn("user", "a"), turn("assistant", "b")]}, *sound(1)])
    [finding] = found(dataset_results(target))
    assert (finding.rule, str(finding.place)) == ("ML601", f"{tmp_path}/rows.jsonl:2")
    assert "--lossy rejected" in finding.detail


def test_the_figures_of_a_recipe_of_pairs_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"this is a preference pair.*--lossy rejected"):
        dataset_statistics(make_target(tmp_path, sound(2)))


def test_parts_of_a_file_of_pairs_are_judged_as_the_whole(tmp_path: Path) -> None:
    records = sound(40)
    opposite = {**records[1], "chosen": records[1]["rejected"], "rejected": records[1]["chosen"]}
    parts = [[*records[:15], "{"], [*records[15:], opposite], [records[3], a_pair("Equal?", "Yes.", "Yes.")]]
    files = [DataFile(write_rows(tmp_path / f"{n}.jsonl", part)) for n, part in enumerate(parts)]

    def of(found: DatasetPass) -> dict[str, Result]:
        return report(found, files, PLAN, recipe=Place.of("recipe.yaml"))

    whole = of(scan(PLAN, files, tokenizer=v3(), processes=1))
    assert {finding.rule for finding in found(whole)} == {"ML601", "ML608", "ML655", "ML658"}
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = DatasetPass()
        for index in order:
            merged.extend(judge_shard(PLAN, index, files[index]))
        assert of(merged) == whole


def test_a_bare_file_of_another_format_is_judged_as_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"prompt": "A colour?", "chosen": "Red.", "rejected": "Red.  "}], indent=1))
    [finding] = found(file_results(path, v3()))
    assert (finding.rule, str(finding.place)) == ("ML655", f"{path} record 1, line 2")
