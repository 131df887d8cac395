"""A transcript's file: one form, and everything that is not of that form is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from sample_transcripts import ROW, transcript

from pytest_mistral_lora.chat.completions import KINDS
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.transcripts import SCHEMA, load, load_folder, violations


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA.data)
    assert set(SCHEMA.data["properties"]) == {*transcript().to_json()} == {*SCHEMA.data["required"]}
    assert SCHEMA.data["properties"]["checks"]["items"]["properties"]["kind"]["enum"] == list(KINDS)


def test_what_is_written_is_read_back_and_written_the_same(tmp_path: Path) -> None:
    file = transcript().write(tmp_path)
    assert file.name == "row-0001.json"
    assert load(file) == transcript()
    assert load(file).to_text() == file.read_text(encoding="utf-8")
    assert load_folder(tmp_path) == load_folder(file) == [transcript()]
    assert "Pâris" in file.read_text(encoding="utf-8")


def test_the_row_ends_where_the_answer_begins() -> None:
    data = transcript().to_json()
    assert data["row"]["messages"] == ROW["messages"][:1]
    assert data["answer"] == ROW["messages"][1:]
    assert data["row"]["tools"] == ROW["tools"]


CHANGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda data: data.update(schema_version=3), "$.schema_version"),
    (lambda data: data.update(case="other"), "$.case: 'other', but the file is row-0001.json"),
    (lambda data: data.pop("margins"), "$.margins: is missing"),
    (lambda data: data.update(extra=1), "$.extra: 1; expected no such key"),
    (lambda data: data["logprobs"].append(-1.0), "$.logprobs: 3 values for 2 tokens"),
    (lambda data: data["logprobs"].__setitem__(0, 0.5), "$.logprobs[0]: 0.5; expected at most 0"),
    (lambda data: data["prompt_ids"].clear(), "$.prompt_ids"),
    (lambda data: data.update(stop="length"), "$.completion_ids: 2 tokens, stopped by length, of at most 8"),
    (lambda data: data.update(max_new_tokens=1), "$.completion_ids: 2 tokens"),
    (lambda data: data["row"].update(tool=[]), "$.row.tool: []; expected no such key"),
    (lambda data: data["row"].pop("messages"), "$.row.messages: is missing"),
    (lambda data: data["row"].update(messages=3), "$.row.messages: 3"),
    (lambda data: data["row"].update(messages=[3]), "$.row.messages[0]: 3"),
    (lambda data: data["answer"].insert(0, {"role": "user", "content": "x"}), "$.answer: it is not the last"),
    (lambda data: data["answer"].__setitem__(0, {"role": "bot"}), "$.row: messages[1]"),
    (lambda data: data["checks"][0].update(passed=False), "$.checks[0]: passed is False, and the reason ''"),
    (lambda data: data["checks"][0].update(kind="regex"), "$.checks[0].value: is missing"),
    (
        lambda data: data["checks"][0].update(kind="json_schema", value={"type": "objekt"}),
        "$.checks[0].value: not a JSON Schema",
    ),
    (lambda data: data["model"].update(tensors_sha256="a"), "$.model.tensors_sha256"),
    (lambda data: data["model"].update(revision="main"), "$.model.revision"),
    (lambda data: data["recorded_with"].pop("torch"), "$.recorded_with.torch: is missing"),
    (lambda data: data.update(precision="int4"), "$.precision"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_each_violation_is_named(change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path) -> None:
    data = json.loads(transcript().to_text())
    assert violations(data, "row-0001") == []
    change(data)
    file = tmp_path / "row-0001.json"
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match="not a golden transcript") as error:
        load(file)
    assert said in str(error.value)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "-1e999"])
def test_a_log_probability_that_is_no_number_is_refused(value: str, tmp_path: Path) -> None:
    file = tmp_path / "row-0001.json"
    file.write_text(transcript().to_text().replace("[-0.25,", f"[{value},"))
    with pytest.raises(InputError, match=re.escape(value)):
        load(file)


def test_a_key_of_ones_own_begins_with_x(tmp_path: Path) -> None:
    file = tmp_path / "row-0001.json"
    file.write_text(json.dumps({**transcript().to_json(), "x-note": "seen"}))
    assert load(file) == transcript()


def test_no_transcripts_is_an_error_that_says_how_to_record_some(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no transcripts.* mistral-lora smoke DIR --record"):
        load_folder(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_folder(tmp_path / "none")
