"""The data of `goldens/`: its files have the forms of `schema.json`, and what a tokenizer refuses is recorded."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from each_oracle import oracle_named
from sampling import sampled

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import SHIPPED
from pytest_mistral_lora.errors import OracleRejection
from pytest_mistral_lora.records.goldens import golden_paths, goldens_folder, packaged_cases, packaged_pairs
from pytest_mistral_lora.records.known_answers import known_answers
from pytest_mistral_lora.records.schema import RecordSchema

FOLDER = goldens_folder()
PAGE = Path(__file__).parents[2] / "docs" / "data.md"
FILES = [f"{kind}.json" for kind in ("cases", "pairs", "answers", "refusals", "published", "provenance")]
CASES = {case.name: case for case in packaged_cases()}
REFUSALS = json.loads((FOLDER / "refusals.json").read_text(encoding="utf-8"))


def violations(definition: str, data: Any) -> list[str]:
    found = RecordSchema(FOLDER / "schema.json", definition=definition).violations(data)
    return [str(violation.place) for violation in found]


def data_of(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_form_of_its_definition(name: str) -> None:
    assert violations(name.removesuffix(".json"), data_of(name)) == []


def test_each_golden_and_each_row_to_train_on_has_its_form() -> None:
    for name in SHIPPED:
        for path in golden_paths(FOLDER / "templates" / name):
            assert violations("golden", json.loads(path.read_text(encoding="utf-8"))) == [], path
        assert violations("encoded", data_of(f"encoded/{name}.json")) == [], name
    for line in (FOLDER / "training" / "conversations.jsonl").read_text(encoding="utf-8").splitlines():
        assert violations("training", json.loads(line)) == []


def test_no_file_is_without_a_definition() -> None:
    beside = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    beside -= {
        f"templates/{name}/{path.name}" for name in SHIPPED for path in golden_paths(FOLDER / "templates" / name)
    }
    beside -= {f"encoded/{name}.json" for name in SHIPPED}
    assert beside == {*FILES, "schema.json", "training/conversations.jsonl"}


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("cases.json", (0, "since"), "7"),
        ("cases.json", (0, "row", "mesages"), []),
        ("pairs.json", (0, "row", "chosen"), "text"),
        ("answers.json", (0, "request"), {"temperature": 0}),
        ("refusals.json", ("spm-v1", "tool-call", "by"), "nobody"),
        ("published.json", ("cases", 0, "recorded", "devstral-small-2505", "labels", 0), -101),
        ("published.json", ("sources", "rows", "commit"), "main"),
        ("published.json", ("cases", 0, "prompt"), {"messages": [{"role": "user", "content": "x"}]}),
        ("provenance.json", ("data_version",), "1"),
        ("encoded/spm-v3.json", ("answers", "plain", "input_ids", 0), "<s>"),
        ("encoded/spm-v3.json", ("pairs", "single", "chosen"), {}),
        ("templates/spm-v3/single.json", ("input_ids", 0), "<s>"),
        ("templates/spm-v3/single.json", ("tokenizer", "sha256"), "0"),
    ],
)
def test_a_changed_value_is_found_at_its_place(name: str, path: tuple[str | int, ...], value: Any) -> None:
    data = deepcopy(data_of(name))
    *outer, last = path
    inner = data
    for key in outer:
        inner = inner[key]
    inner[last] = value
    definition = {"templates": "golden", "encoded": "encoded"}.get(name.split("/")[0], name.removesuffix(".json"))
    place = "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    [found] = violations(definition, data)
    # a case with both a row and a prompt is wrong as a whole, and a request in its key
    assert place.startswith(found) or found.startswith(place)


@pytest.mark.parametrize("name", sampled(sorted(SHIPPED), ("spm-v1", "spm-v2", "spm-v7", "tekken-240911")))
def test_the_refusals_of_a_tokenizer_are_recorded_with_their_fields(name: str) -> None:
    found = {}
    for case in CASES.values():
        try:
            oracle_named(name).encode(parse_row(case.row.to_json()))
        except OracleRejection as error:
            found[case.name] = str(error.place)
    assert found == {case: refusal["at"] for case, refusal in REFUSALS[name].items()}


@pytest.mark.parametrize("name", sampled(sorted(SHIPPED), ("spm-v1", "spm-v3", "tekken-240911")))
def test_the_encodings_of_answers_and_pairs_are_recorded(name: str) -> None:
    recorded = data_of(f"encoded/{name}.json")
    oracle = oracle_named(name)
    answers = {answer.name: answer for answer in known_answers()}
    assert recorded["answers"].keys() == answers.keys()
    for case, encoding in recorded["answers"].items():
        if "refusal" not in encoding:
            encoded = oracle.encode(answers[case].row)
            assert (encoding["input_ids"], encoding["labels"]) == (list(encoded.input_ids), list(encoded.labels))
        else:
            with pytest.raises(OracleRejection) as refused:
                oracle.encode(answers[case].row)
            assert str(refused.value.place).endswith(encoding["refusal"]["at"])
    pairs = {pair.name: pair for pair in packaged_pairs()}
    assert recorded["pairs"].keys() == pairs.keys()
    for case, sides in recorded["pairs"].items():
        for row in pairs[case].rows:
            if "refusal" not in sides[row.side]:
                assert sides[row.side]["input_ids"] == list(oracle.encode(row).input_ids)
            else:
                assert not pairs[case].fits(oracle) or pairs[case].is_refused


def test_a_case_is_not_both_recorded_and_refused() -> None:
    for name in SHIPPED:
        recorded = {path.stem for path in golden_paths(FOLDER / "templates" / name)}
        assert recorded.isdisjoint(REFUSALS[name])
        assert recorded | REFUSALS[name].keys() <= CASES.keys()
        unrecorded = CASES.keys() - recorded - REFUSALS[name].keys()
        assert not any(CASES[case].fits(oracle_named(name)) for case in unrecorded)


def test_the_page_shows_a_golden_as_it_is_recorded() -> None:
    text = PAGE.read_text(encoding="utf-8")
    [example] = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    shown = json.loads(example)
    golden = data_of(f"templates/spm-v3/{shown['case']}.json")
    golden["tokenizer"]["sha256"] = f"{golden['tokenizer']['sha256'][:8]}..."
    assert shown == {key: golden[key] for key in shown}


def test_the_page_names_each_file_and_each_field_that_a_reader_needs() -> None:
    named = set(re.findall(r"`([\w./-]+)`", PAGE.read_text(encoding="utf-8")))
    definitions = data_of("schema.json")["$defs"]
    fields = {*definitions["golden"]["properties"], *definitions["cases"]["items"]["properties"]}
    fields -= {"schema_version", "case", "description", "tokenizer", "recorded_with"}
    assert {
        *FILES,
        "encoded/TOKENIZER.json",
        "training/conversations.jsonl",
        *fields,
        "at",
        "by",
        "data_version",
    } <= named
