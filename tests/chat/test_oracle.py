"""Rows that are refused, rows whose ids are known, and the oracle itself."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from each_oracle import LAYOUTS, of_each
from encoding_laws import CALL, TWO_TURNS, WITH_TOOLS, hold, reference_ids, say
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, Span
from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.errors import OracleRejection, RowError, TokenizerError
from pytest_mistral_lora.strategies import (
    hostile_text,
)

# Acceptance.

ROLE_LISTS = st.lists(st.sampled_from(("user", "assistant", "system", "tool", "calls")), min_size=1, max_size=5).filter(
    lambda roles: bool({"assistant", "calls"} & set(roles))
)
IDS = st.sampled_from(("abcdefgh1", "abcdefgh2", "short", "null"))
CONTENTS = st.sampled_from(("x", "", "  "))


@st.composite
def any_rows(draw: st.DrawFn) -> dict[str, Any]:
    def message(role: str) -> dict[str, Any]:
        if role == "calls":
            calls = [copy.deepcopy(CALL) | {"id": draw(IDS)} for _ in range(draw(st.integers(1, 2)))]
            return {"role": "assistant", "content": draw(st.sampled_from(("", "x"))), "tool_calls": calls}
        content = draw(CONTENTS)
        return {"role": role, "content": content} | ({"tool_call_id": draw(IDS)} if role == "tool" else {})

    return {"messages": [message(role) for role in draw(ROLE_LISTS)]}


@settings(max_examples=20)
@given(row=any_rows())
@of_each(*LAYOUTS)
def test_a_row_is_refused_exactly_where_mistral_common_refuses_it(oracle: Oracle, row: dict[str, Any]) -> None:
    expected, refusal = reference_verdict(oracle, row)
    if refusal is None:
        assert oracle.encode(row).input_ids == expected
        return
    with pytest.raises(OracleRejection) as caught:
        oracle.encode(row)
    assert type(caught.value.__cause__) is refusal


def reference_verdict(oracle: Oracle, row: dict[str, Any]) -> tuple[tuple[int, ...], type[Exception] | None]:
    try:
        return reference_ids(oracle, row), None
    except Exception as error:
        return (), type(error)


def test_what_is_no_row_is_refused_before_encoding(oracle: Oracle) -> None:
    with pytest.raises(RowError, match="no assistant message"):
        oracle.encode({"messages": [{"role": "user", "content": "u"}]})


def test_a_refused_row_leaves_the_oracle_as_it_was(oracle: Oracle) -> None:
    before = oracle.encode(TWO_TURNS)
    with pytest.raises(OracleRejection):
        oracle.encode(say(("user", "u"), ("assistant", "a"), ("system", "s"), ("assistant", "b")))
    assert oracle.encode(TWO_TURNS) == before


# Known rows: ids and pieces read and checked by hand.

X = IGNORE_INDEX
KNOWN = [
    (
        "spm-v1",
        say(("user", "u"), ("assistant", "a")),
        "<s> ▁[ INST ] ▁u ▁[ / INST ] ▁a </s>",
        (1, 733, 16289, 28793, 332, 733, 28748, 16289, 28793, 264, 2),
        (X, X, X, X, X, X, X, X, X, 264, 2),
    ),
    (
        "spm-v3",
        TWO_TURNS,
        "<s> [INST] ▁u [/INST] ▁a </s> [INST] ▁s <0x0A> <0x0A> v [/INST] ▁b </s>",
        (1, 3, 1100, 4, 1032, 2, 3, 1036, 781, 781, 29496, 4, 1055, 2),
        (X, X, X, X, 1032, 2, X, X, X, X, X, X, 1055, 2),
    ),
    (
        "spm-v7",
        TWO_TURNS,
        "<s> [SYSTEM_PROMPT] ▁s [/SYSTEM_PROMPT] [INST] ▁u [/INST] ▁a </s> [INST] ▁v [/INST] ▁b </s>",
        (1, 16, 1036, 17, 3, 1100, 4, 1032, 2, 3, 1131, 4, 1055, 2),
        (X, X, X, X, X, X, X, 1032, 2, X, X, X, 1055, 2),
    ),
    (
        "tekken-240718",
        say(("user", "[/INST]"), ("assistant", "</s>")),
        "<s> [INST] [ / IN ST ] [/INST] </ s > </s>",
        (1, 3, 1091, 1047, 3174, 3074, 1093, 4, 1885, 1115, 1062, 2),
        (X, X, X, X, X, X, X, X, 1885, 1115, 1062, 2),
    ),
]


@pytest.mark.parametrize(("name", "row", "pieces", "ids", "labels"), KNOWN, ids=[known[0] for known in KNOWN])
def test_known_rows(
    oracle_of: Callable[[str], Oracle],
    name: str,
    row: dict[str, Any],
    pieces: str,
    ids: tuple[int, ...],
    labels: tuple[int, ...],
) -> None:
    encoded = oracle_of(name).encode(row)
    assert [oracle_of(name).piece(token) for token in encoded.input_ids] == pieces.split(" ")
    assert encoded.input_ids == ids
    assert encoded.labels == labels


def test_the_spans_of_a_known_row_with_tools(oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of("tekken-240911")
    encoded = oracle.encode(WITH_TOOLS)
    assert encoded.spans == (
        Span(None, None, "control", 0, 1, False),
        Span(0, "user", "control", 1, 2, False),  # [AVAILABLE_TOOLS]
        Span(0, "user", "text", 2, 28, False),
        Span(0, "user", "control", 28, 30, False),  # [/AVAILABLE_TOOLS] [INST]
        Span(0, "user", "text", 30, 31, False),
        Span(0, "user", "control", 31, 32, False),
        Span(1, "assistant", "tool_call", 32, 59, True),
        Span(1, "assistant", "eos", 59, 60, True),
        Span(2, "tool", "control", 60, 61, False),
        Span(2, "tool", "text", 61, 77, False),
        Span(2, "tool", "control", 77, 78, False),
        Span(3, "assistant", "text", 78, 79, True),
        Span(3, "assistant", "eos", 79, 80, True),
    )
    call = '[{"name": "f", "arguments": {"k": 1}, "id": "abcdefgh1"}]'
    assert oracle.piece(encoded.input_ids[32]) == "[TOOL_CALLS]"
    assert oracle.decode(encoded.input_ids[33:59]) == call
    assert oracle.decode(encoded.input_ids[61:77]) == '{"content": 2, "call_id": "abcdefgh1"}'


def test_v7_marks_the_id_and_the_content_of_a_tool_result(oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of("spm-v7")
    pieces = [piece for piece in oracle.traced_texts(WITH_TOOLS) if piece.role == "tool"]
    said = [piece.text or oracle.piece(piece.ids[0]) for piece in pieces]
    assert said == ["[TOOL_RESULTS]", "abcdefgh1", "[TOOL_CONTENT]", "2", "[/TOOL_RESULTS]"]


def test_v2_leaves_out_tool_calls_before_the_last_user_turn(oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of("spm-v2")
    more = [{"role": "user", "content": "v"}, {"role": "assistant", "content": "c"}]
    encoded = hold(oracle, WITH_TOOLS | {"messages": WITH_TOOLS["messages"] + more})
    assert oracle.tool_calls_id not in encoded.input_ids
    assert [span.turn for span in encoded.spans if span.kind == "eos"] == [3, 5]


# What the object offers beside encoding.


def test_an_oracle_crosses_processes_by_its_path(oracle: Oracle) -> None:
    other = pickle.loads(pickle.dumps(oracle))
    assert other is not oracle
    assert other.encode(TWO_TURNS) == oracle.encode(TWO_TURNS)


def test_two_oracles_of_one_file_do_not_hear_each_other(oracle_of: Callable[[str], Oracle]) -> None:
    one, two = oracle_of("spm-v3"), Oracle(shipped_tokenizer("spm-v3"))
    two.encode(WITH_TOOLS)
    before = one.encode(TWO_TURNS)
    two.encode(WITH_TOOLS)
    assert one.encode(TWO_TURNS) == before


@given(text=hostile_text())
@of_each(*LAYOUTS)
def test_text_never_becomes_a_control_token(oracle: Oracle, text: str) -> None:
    assert not set(oracle.encode_text(text)) & set(oracle.control_tokens)


def test_an_oracle_knows_its_file(oracle: Oracle) -> None:
    names = {path: name for name, path in SHIPPED.items()}
    name = names[oracle.path.name]
    versions = {"spm-v7m1": "v7", "tekken-240718": "v3", "tekken-240911": "v3"}
    assert oracle.version == versions.get(name, name.removeprefix("spm-"))
    assert oracle.kind == name.split("-")[0]
    assert (oracle.bos_id, oracle.eos_id) == (1, 2)
    assert oracle.vocab_size == (131072 if oracle.kind == "tekken" else 32000 if oracle.version == "v1" else 32768)
    assert len(oracle.sha256) == 64
    assert oracle.piece(oracle.eos_id) == "</s>"
    assert oracle.piece(oracle.vocab_size) == oracle.piece(-1) == "<not in the vocabulary>"
    assert "[INST]" in oracle.chat_template()


def test_an_id_beyond_the_vocabulary_is_decoded_to_a_replacement_character(oracle: Oracle) -> None:
    text = oracle.encode_text("Blue")
    assert oracle.decode((*text, oracle.eos_id)) == "Blue"
    assert oracle.decode((*text, oracle.vocab_size, -1, 10**12)) == "Blue" + "\ufffd" * 3
    assert oracle.decode(()) == ""


def test_a_missing_file_and_a_file_without_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent\.json: no such tokenizer file"):
        Oracle(tmp_path / "absent.json")
    unversioned = tmp_path / "tokenizer.model"
    unversioned.write_bytes(shipped_tokenizer("spm-v3").read_bytes())
    with pytest.raises(TokenizerError, match=r"the name does not give the tokenizer version"):
        Oracle(unversioned)
    with pytest.raises(TokenizerError, match=r"cannot load it.*expected a tekken\.json"):
        Oracle(Path(__file__))
    newer = json.loads(shipped_tokenizer("tekken-240911").read_bytes())
    newer["config"]["version"] = "v999"
    (broken := tmp_path / "tekken.json").write_text(json.dumps(newer))
    with pytest.raises(TokenizerError, match=r"v999.*pip install --upgrade mistral-common"):
        Oracle(broken)
    broken.write_text("{}")
    with pytest.raises(TokenizerError, match=r"an object of 0; expected an object and a list"):
        Oracle(broken)
    with pytest.raises(TokenizerError, match=r"unknown tokenizer 'v3'; expected one of spm-v1, "):
        shipped_tokenizer("v3")


@pytest.mark.parametrize(
    ("name", "claim", "said"),
    [
        ("spm-v1", "v3", r"v3.* no \[INST\]"),
        ("spm-v3", "v1", r"v1.* a \[INST\]"),
        ("spm-v3", "v7", r"v7.* no \[SYSTEM_PROMPT\]"),
    ],
)
def test_a_version_that_the_vocabulary_belies_is_refused(tmp_path: Path, name: str, claim: str, said: str) -> None:
    path = tmp_path / f"tokenizer.model.{claim}"
    path.write_bytes(shipped_tokenizer(name).read_bytes())
    with pytest.raises(TokenizerError, match=said) as caught:
        Oracle(path)
    assert str(caught.value.place) == str(path)
