"""Goldens that are broken on purpose, each with the rule or the violation that must catch it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance.laws import spoken_text_violation
from pytest_mistral_lora.conformance.targets import EMBEDDED, Target
from pytest_mistral_lora.conformance.template import judge
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.goldens import form_violations, golden_paths, goldens_folder, load

FOLDER = goldens_folder() / "templates" / "spm-v3"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_packaged_golden_has_the_right_form(name: str) -> None:
    paths = golden_paths(goldens_folder() / "templates" / name)
    assert len(paths) >= 20
    oracle = Oracle(shipped_tokenizer(name))
    for path in paths:
        golden = load(path)
        assert golden.tokenizer["sha256"] == oracle.sha256
        assert spoken_text_violation(golden.row, golden.encoded, oracle) == "", path


def test_the_embedded_targets_are_what_is_shipped() -> None:
    assert tuple(SHIPPED) == EMBEDDED


def without(key: str) -> Callable[[Any], None]:
    return lambda data: data.pop(key)


def put(key: str, value: Any) -> Callable[[Any], None]:
    return lambda data: data.update({key: value})


def label_shifted(data: Any) -> None:
    data["labels"] = [-100, *data["labels"][:-1]]


def span_missing(data: Any) -> None:
    del data["spans"][2]


FORM_MUTANTS = {
    "a key is missing": (without("labels"), r"\$: 'labels' is a required property"),
    "an unknown key": (put("note", "x"), "'note' was unexpected"),
    "another name": (put("case", "other"), r"\$\.case: 'other', but the file is single\.json"),
    "a text for an id": (put("input_ids", ["1"]), r"\$\.input_ids\[0\]: '1' is not of type 'integer'"),
    "no row": (put("row", {"messages": [{"role": "bot"}]}), r"\$\.row: messages\[0\]\.role: 'bot'"),
    "shifted labels": (label_shifted, r"\$\.labels: differ from what the spans say, first at token 10"),
    "a hole in the spans": (span_missing, r"\$\.spans: they do not partition input_ids"),
}


@pytest.mark.parametrize("name", FORM_MUTANTS)
def test_a_golden_of_the_wrong_form_is_caught(name: str, tmp_path: Path) -> None:
    change, message = FORM_MUTANTS[name]
    data = json.loads((FOLDER / "single.json").read_text())
    assert form_violations(data, "single") == []
    change(data)
    path = tmp_path / "single.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        load(path)


def _moved_id(data: Any) -> None:
    data["input_ids"][3] += 1


def _weight_of_another_turn(data: Any) -> None:
    for span in data["spans"]:
        if span["role"] == "assistant":
            span["supervised"] = not span["supervised"]
    _labels_from_spans(data)


def _labels_from_spans(data: Any) -> None:
    data["labels"] = [
        token if span["supervised"] else -100
        for span in data["spans"]
        for token in data["input_ids"][span["start"] : span["end"]]
    ]


def _another_answer(data: Any) -> None:
    data["row"]["messages"][-1]["content"] = "Something else."


def _another_question(data: Any) -> None:
    data["row"]["messages"][0]["content"] += "?"


def _known_of_no_deviation(data: Any) -> None:
    data["deviations"] = []


CONTENT_MUTANTS = {
    "one id moved": ("single", _moved_id, "ML002"),
    "labels of another turn": ("weight-zero", _weight_of_another_turn, "ML003"),
    "another answer": ("single", _another_answer, "ML001"),
    "another question": ("single", _another_question, "ML002"),
    "a deviation that was not recorded": ("trailing-spaces", _known_of_no_deviation, "ML005"),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return Target("spm-v3")


@pytest.mark.parametrize("name", CONTENT_MUTANTS)
def test_a_golden_with_other_content_is_caught(name: str, target: Target, tmp_path: Path) -> None:
    case, change, rule = CONTENT_MUTANTS[name]
    path = Path(shutil.copy(FOLDER / f"{case}.json", tmp_path))
    assert judge(target, load(path), recorded=True).findings == ()
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    assert [finding.rule for finding in judge(target, load(path), recorded=True).findings] == [rule]
