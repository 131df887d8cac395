"""A preference pair is two rows with one prompt, and a rated answer is one; each is checked field by field."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from each_oracle import LAYOUTS, WITH_TOOLS, of_each, oracle_named
from hypothesis import given, settings
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from pytest_mistral_lora.chat.kinds import rated
from pytest_mistral_lora.chat.kinds.pair import PAIR
from pytest_mistral_lora.chat.kinds.preference import answer_start
from pytest_mistral_lora.chat.kinds.records import parse_rows, record_kind
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.request import request_data
from pytest_mistral_lora.chat.row_files import read_rows, scan_records, scan_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RowError, RowsError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.strategies import pairs

PROMPT = [{"role": "user", "content": "A colour?"}]
RED, BLUE = ([{"role": "assistant", "content": text}] for text in ("Red.", "Blue is one, and so is green."))
A_PAIR = {"prompt": PROMPT, "chosen": RED, "rejected": BLUE}
RATED = {"prompt": PROMPT, "completion": RED, "label": True}
TALK = [*PROMPT, *BLUE, {"role": "user", "content": "A shorter one?"}]


def test_a_pair_is_two_rows_with_one_prompt():
    assert record_kind(A_PAIR) is PAIR
    chosen, rejected = parse_rows({**A_PAIR, "prompt": TALK, "score": 4}, place=Place.of("rows.jsonl", 3))
    earlier = {**BLUE[0], "weight": 0}
    assert [row.side for row in (chosen, rejected)] == ["chosen", "rejected"]
    assert [str(row.place) for row in (chosen, rejected)] == ["rows.jsonl:3, chosen", "rows.jsonl:3, rejected"]
    for row, answer in ((chosen, RED), (rejected, BLUE)):
        assert row == Row.from_dict({"messages": [PROMPT[0], earlier, TALK[2], *answer]})
        assert answer_start(row) == 3
    assert [row.kind.counts_as_wanted(row) for row in (chosen, rejected)] == [True, False]


@pytest.mark.parametrize(("label", "side"), [(True, "wanted"), (False, "unwanted")])
def test_a_rated_answer_is_one_row(label, side):
    assert record_kind({**RATED, "label": label}) is rated.RATED
    [row] = parse_rows({**RATED, "label": label}, place=Place.of("rows.jsonl", 3))
    assert (row.side, str(row.place), row.kind.counts_as_wanted(row)) == (side, "rows.jsonl:3", label)
    assert row.to_json() == {"messages": [*PROMPT, *RED]}


TOOL = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object"}}}


def test_both_sides_have_the_settings_of_the_record():
    settings = {"tools": [TOOL], "reasoning_effort": "high", "response_format": {"type": "json_object"}}
    for row in parse_rows({**A_PAIR, **settings}):
        assert {key: row.to_json()[key] for key in settings} == settings


@pytest.mark.parametrize("oracle_name", ["spm-v1", "spm-v3", "tekken-cut"])
def test_only_the_answer_is_scored(oracle_name):
    oracle = oracle_named(oracle_name)
    for row in parse_rows({**A_PAIR, "prompt": TALK}):
        encoded = oracle.encode(row)
        assert encoded.input_ids == oracle.reference({"messages": [*TALK, *row.messages[3:]]})
        start = next(at for at, label in enumerate(encoded.labels) if label != -100)
        assert encoded.input_ids[:start] == oracle.encode_prompt(row)
        assert encoded.labels[start:] == encoded.input_ids[start:]


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            {"prompt": [*PROMPT, {**RED[0], "weight": 1}, *PROMPT]},
            [*PROMPT, {**RED[0], "weight": 0}, *PROMPT, *BLUE],
        ),
    ],
)
def test_what_other_programs_write_is_converted(change, messages):
    _, rejected = parse_rows({**A_PAIR, **change})
    assert list(rejected.messages) == messages
    assert rejected.converted == ("answers in the prompt have weight 0",)


@pytest.mark.parametrize(
    ("change", "place", "found"),
    [
        ({"prompt": []}, "prompt", "is empty"),
        ({"chosen": []}, "chosen", "is empty"),
        ({"rejected": []}, "rejected", "is empty"),
        ({"rejected": [{"role": "bot", "content": "x"}]}, "rejected[0].role", "'bot'"),
        ({"rejected": PROMPT + RED}, "rejected[0].role", "'user'"),
        ({"prompt": PROMPT + RED}, "prompt[1].role", "'assistant'"),
        ({"chosen": [{**RED[0], "weight": 0}]}, "chosen[0].weight", "0"),
        ({"tool": []}, "", "unknown key 'tool'"),
        ({"tools": {}}, "tools", "is an object"),
        ({"audios": ["a.wav"]}, "audios", "a row with audios"),
    ],
)
def test_a_faulty_pair_is_refused_with_its_field(change, place, found):
    with pytest.raises(RowError) as error:
        parse_rows({**A_PAIR, **change}, place=Place.of("rows.jsonl", 3))
    assert str(error.value.place) == ", ".join(filter(None, ("rows.jsonl:3", place)))
    assert error.value.found.startswith(found)


def test_pictures_of_a_pair_stand_in_the_prompt_of_both_sides():
    picture = {"url": "a.png", "width": 10, "height": 20}
    chosen, rejected = parse_rows({**A_PAIR, "images": [picture]})
    assert chosen.messages[0]["content"][0] == {"type": "image_url", "image_url": "a.png", "width": 10, "height": 20}
    assert rejected.messages[0] == chosen.messages[0]


@pytest.mark.parametrize(
    "record", [{**A_PAIR, "chosen": "Red."}, {**A_PAIR, "prompt": "A colour?"}, {**RATED, "label": 1}]
)
def test_another_form_is_refused_with_the_command_that_converts_it(record):
    with pytest.raises(RowError) as error:
        parse_rows(record, place=Place.of("pairs.jsonl", 3))
    assert error.value.next_step == "Convert it: mistral-lora import pairs.jsonl --to rows.jsonl"


def test_what_trains_refuses_both_kinds_with_the_way_out(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in (A_PAIR, RATED)), encoding="utf-8")
    assert [len(rows) for rows in scan_records(path)] == [2, 1]
    pair, rated = scan_rows(path)
    assert (str(pair.place), str(rated.place)) == (f"{path}:1", f"{path}:2")
    assert "--lossy rejected" in pair.next_step
    assert "DPOTrainer" in pair.next_step
    assert "--lossy unwanted" in rated.next_step
    assert "KTOTrainer" in rated.next_step
    with pytest.raises(RowsError, match="this is a preference pair"):
        list(read_rows(path))


@functools.cache
def prompts_of(path: str) -> MistralTokenizer:
    """Return mistral-common's own tokenizer for prompts, which end with a request or with the result of a tool."""
    return MistralTokenizer.from_file(path, mode=ValidationMode.test)


def hold(oracle: Oracle, pair: dict[str, Any]) -> None:
    """Compare each side with the library alone: the ids of the prompt, then those of the answer, which are scored."""
    request = request_data(Row(tuple(pair["prompt"]), tuple(pair.get("tools", ())) or None))
    for message in request["messages"]:
        # a request has no weights
        message.pop("weight", None)
    prompt = tuple(prompts_of(str(oracle.path)).encode_chat_completion(ChatCompletionRequest(**request)).tokens)
    encoded = []
    for row in parse_rows(pair):
        plain = {"messages": [*pair["prompt"], *pair[row.side]], "tools": pair.get("tools")}
        side = oracle.encode(row)
        assert side.input_ids == oracle.reference(plain)
        assert side.input_ids[: len(prompt)] == prompt
        assert set(side.labels[: len(prompt)]) == {-100}
        for span in side.spans:
            # all of an answer but what a tool said
            assert span.supervised is (span.start >= len(prompt) and span.role == "assistant"), span
        encoded.append(side)
    assert encoded[0].input_ids != encoded[1].input_ids
    rows = parse_rows(pair)
    assert parse_rows(rows[0].kind.record(rows)) == rows


@settings(max_examples=10)
@given(pair=pairs())
@of_each(*LAYOUTS)
def test_each_side_has_the_ids_of_mistral_common(oracle: Oracle, pair: dict[str, Any]) -> None:
    hold(oracle, pair)


@settings(max_examples=6)
@given(single=pairs(tools=True), several=pairs(tools=True, parallel=True))
@of_each(*WITH_TOOLS)
def test_each_side_with_calls_has_the_ids_of_mistral_common(
    oracle: Oracle, single: dict[str, Any], several: dict[str, Any]
) -> None:
    hold(oracle, single if oracle.version == "v2" else several)
