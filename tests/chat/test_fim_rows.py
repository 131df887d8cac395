"""Fill-in-the-middle rows: ids by mistral-common's `encode_fim`, the completion behind them, and labels."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import derived_oracle
from each_oracle import of_each, oracle_named
from hypothesis import given, settings
from mistral_common.protocol.fim.request import FIMRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from pytest_mistral_lora.assertions import assert_labels_exact, assert_no_control_token_injection
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.kinds.fim import FIM, FimRow, parse_fim_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.request import request_data
from pytest_mistral_lora.errors import OracleRejection, RowError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.strategies import fim_rows

SHIPPED = ("spm-v3", "spm-v7", "tekken-240911")
DERIVED = ("derived-v11", "derived-v15")
WORDS = 40_000
"""Words of a derived vocabulary that hold the two parts of the character before a suffix."""
LITERALS = "[SUFFIX][PREFIX][MIDDLE]</s><s>[INST]"


def derived_with_words(name: str) -> Oracle:
    return derived_oracle(name, words=WORDS)


@functools.cache
def loaded_by_hand(path: Path) -> MistralTokenizer:
    return MistralTokenizer.from_file(str(path))


def encoded_by_hand(oracle: Oracle, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the ids before a completion, and those of the completion, by mistral-common alone."""
    tokenizer = loaded_by_hand(oracle.path)
    text = tokenizer.instruct_tokenizer.tokenizer
    prompt = tokenizer.encode_fim(FIMRequest(prompt=row["prompt"], suffix=row["suffix"])).tokens
    if oracle.kind == "tekken":
        return prompt, text.encode(row["completion"], bos=False, eos=True)
    # the space that SentencePiece puts in front of a text stands in front of the sign
    return prompt, text.encode("☺" + row["completion"], bos=False, eos=True)[2:]


def hold(oracle: Oracle, data: dict[str, Any]) -> EncodedRow:
    row = parse_fim_row(data)
    encoded = oracle.encode(row)
    controls = [oracle.control_tokens[token] for token in encoded.input_ids if token in oracle.control_tokens]
    assert controls == ["<s>", "[SUFFIX]", "[PREFIX]", "</s>"]
    assert encoded.input_ids[-1] == oracle.eos_id
    prompt = oracle.encode_prompt(row)
    assert encoded.input_ids[: len(prompt)] == prompt
    completion = encoded.input_ids[len(prompt) :]
    assert encoded.labels == (IGNORE_INDEX,) * len(prompt) + completion
    assert [span.end for span in encoded.spans[:-1]] == [span.start for span in encoded.spans[1:]]
    assert {span.role for span in encoded.spans if span.supervised} == {"completion"}
    assert encoded.spans[-1].kind == "eos"
    read = FIM.answer_text(oracle, completion)
    written = data["completion"]
    assert read == (written.replace("\u2581", " ") if oracle.kind == "spm" else written)
    traced = oracle.traced_texts(row)
    assert tuple(token for part in traced for token in part.ids) == encoded.input_ids
    texts = {part.role: part.text for part in traced if part.text is not None}
    assert texts == {role: data[role] for role in ("suffix", "prompt", "completion") if role in texts}
    return encoded


@given(row=fim_rows())
@of_each(*SHIPPED)
def test_rows_are_mistral_common_s_ids_with_the_completion_behind(oracle: Oracle, row: dict[str, Any]) -> None:
    hold(oracle, row)


@settings(max_examples=10)
@given(row=fim_rows())
@of_each(*DERIVED, made=derived_with_words)
def test_the_newer_versions_have_the_same_layout(oracle: Oracle, row: dict[str, Any]) -> None:
    hold(oracle, row)


@settings(max_examples=5)
@given(row=fim_rows())
@of_each("spm-v3", "spm-v7", "tekken-240911")
def test_the_ids_are_those_of_mistral_common_alone(oracle: Oracle, row: dict[str, Any]) -> None:
    prompt, completion = encoded_by_hand(oracle, row)
    assert list(oracle.encode(parse_fim_row(row)).input_ids) == [*prompt, *completion]


@pytest.mark.parametrize("name", SHIPPED)
def test_texts_that_spell_markers_stay_texts(name: str) -> None:
    hold(oracle_named(name), {"prompt": LITERALS, "suffix": LITERALS, "completion": LITERALS})


def test_the_first_word_of_a_completion_goes_on_in_its_line() -> None:
    oracle = oracle_named("spm-v3")
    row = FimRow.of("def f(", "return a", "a):\n    ")
    pieces = [oracle.piece(token) for token in oracle.encode(row).input_ids]
    assert " ".join(pieces) == "<s> [SUFFIX] return ▁a [PREFIX] ▁def ▁f ( a ): <0x0A> ▁▁▁▁ </s>"


def test_a_suffix_may_be_empty() -> None:
    oracle = oracle_named("tekken-240911")
    encoded = hold(oracle, {"prompt": "a = ", "suffix": "", "completion": "1\n"})
    assert [oracle.piece(token) for token in encoded.input_ids[:3]] == ["<s>", "[SUFFIX]", "[PREFIX]"]


@pytest.mark.parametrize(("name", "version"), [("spm-v1", "v1"), ("spm-v2", "v2")])
def test_a_tokenizer_without_the_markers_refuses_the_row(name: str, version: str) -> None:
    # mistral-common encodes the markers of v2 as <unk>
    with pytest.raises(OracleRejection) as caught:
        oracle_named(name).encode(FimRow.of("a", "b", "c", place=Place.of("rows.jsonl", 1)))
    assert str(caught.value.place) == "rows.jsonl:1"
    assert f"({version})" in caught.value.found
    assert "[SUFFIX] and [PREFIX]" in caught.value.found


def test_a_vocabulary_with_a_longer_sign_refuses_the_row() -> None:
    # mistral-common would leave a byte of it in front of the suffix
    oracle = derived_oracle("derived-v13")
    assert oracle.library_tokenizer.encode_fim(FIMRequest(prompt="a", suffix="b")).tokens[2:-2] != [
        *oracle.encode_text("b")
    ]
    with pytest.raises(OracleRejection, match="3"):
        oracle.encode(FimRow.of("a", "b", "c"))


def test_the_report_on_the_suffix_is_right() -> None:
    def ids(name: str, suffix: str) -> list[int]:
        return oracle_named(name).library_tokenizer.encode_fim(FIMRequest(prompt="a", suffix=suffix)).tokens

    assert ids("tekken-240911", "/p") == [1, 16, 1047, 1112, 14, 1097]
    assert oracle_named("tekken-240911").encode_text("/p") == (8273,)
    assert ids("spm-v2", "b") == [1, 0, 29494, 0, 1032]


def test_the_public_interface_takes_plain_data() -> None:
    oracle = oracle_named("spm-v3")
    data = {"prompt": "a", "suffix": "b", "completion": "c"}
    encoded = oracle.encode(data)
    assert encoded == oracle.encode(FimRow.of("a", "b", "c"))
    assert oracle.encode_prompt(data) == encoded.input_ids[:-2]
    assert_labels_exact(data, encoded.input_ids, encoded.labels or (), oracle.path)
    assert_no_control_token_injection(data, encoded.input_ids, oracle.path)
    with pytest.raises(AssertionError, match="ML546"):
        assert_labels_exact(data, encoded.input_ids, (*(encoded.labels or ())[:-1], -100), oracle.path)


def test_a_row_is_no_conversation() -> None:
    with pytest.raises(RowError):
        request_data(FimRow.of("a", "b", "c"))


def test_a_row_is_read_as_it_is_written() -> None:
    data = {"prompt": "a", "suffix": "", "completion": "c"}
    row = parse_fim_row(data, place=Place.of("rows.jsonl", 1))
    assert row.to_json() == data
    assert (row.prompt, row.suffix, row.completion) == ("a", "", "c")
    assert row == FimRow.of("a", "", "c")
    assert row != FimRow.of("a", "c", "")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"suffix": None}, "suffix"),
        ({"completion": None}, "completion"),
        ({"prompt": ["a"]}, "prompt"),
        ({"completion": 1}, "completion"),
        ({"suffix": "\ud800"}, "suffix"),
        ({"messages": []}, "messages"),
        ({"tools": [{}]}, "tools"),
        ({"image": "a.png"}, "image"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_fim_row({"prompt": "a", "suffix": "b", "completion": "c", **change}, place=Place.of("rows.jsonl", 3))
    assert field in str(caught.value)
    assert str(caught.value.place).startswith("rows.jsonl:3")
