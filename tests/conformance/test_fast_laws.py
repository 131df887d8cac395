"""The laws of a row compare slices and marks; token by token, they find the same."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.likeness import _KEPT, _OF_NUMBER, _kept
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.dataset.observers import RowRules
from pytest_mistral_lora.conformance.mask.row_laws import (
    _CLOSES,
    _OPENS,
    bos_violation,
    partition_violation,
    scan_labels,
)
from pytest_mistral_lora.strategies import tool_rows


@cache
def _oracle(name: str) -> Oracle:
    return Oracle(shipped_tokenizer(name))


def _scanned(ids: list[int], oracle: Oracle) -> tuple[int, ...]:
    labels, inside = [], False
    for token in ids:
        name = oracle.control_tokens.get(token)
        inside = inside or name in _OPENS
        labels.append(IGNORE_INDEX if inside or token == oracle.bos_id else token)
        inside = inside and name not in _CLOSES
    return tuple(labels)


@settings(max_examples=100)
@given(data=st.data())
def test_labels_are_read_off_control_tokens(data: st.DataObject) -> None:
    oracle = _oracle(data.draw(st.sampled_from(("spm-v3", "spm-v7", "tekken-240911"))))
    marks = [token for token, name in oracle.control_tokens.items() if name in (*_OPENS, *_CLOSES, "<s>", "</s>")]
    ids = data.draw(st.lists(st.one_of(st.sampled_from(marks), st.integers(2000, 2009)), max_size=30))
    assert scan_labels(ids, oracle) == scan_labels(tuple(ids), oracle) == _scanned(ids, oracle)


def _slow_partition(encoded: EncodedRow) -> tuple[int, int] | None:
    """Return the first token whose label is not that of its span, with the label."""
    for span in encoded.spans:
        for index in range(span.start, min(span.end, len(encoded.input_ids))):
            want = encoded.input_ids[index] if span.supervised else IGNORE_INDEX
            if encoded.labels is not None and encoded.labels[index] != want:
                return index, encoded.labels[index]
    return None


@settings(max_examples=60)
@given(row=tool_rows(), data=st.data())
def test_a_label_against_its_span_is_found(row: dict[str, Any], data: st.DataObject) -> None:
    oracle = _oracle("spm-v3")
    encoded = oracle.encode(parse_row(row))
    labels = list(encoded.labels or ())
    for _ in range(data.draw(st.integers(0, 2))):
        labels[data.draw(st.integers(0, len(labels) - 1))] = data.draw(st.sampled_from((IGNORE_INDEX, 5)))
    changed = EncodedRow(encoded.input_ids, tuple(labels), encoded.spans)
    found, wrong = partition_violation(parse_row(row), changed, oracle), _slow_partition(changed)
    assert found.startswith(f"label {wrong[1]} at token {wrong[0]};" if wrong else "")
    assert bool(found) == bool(wrong)


@given(ids=st.lists(st.sampled_from((1, 1000, 1001)), max_size=6))
def test_bos_is_counted(ids: list[int]) -> None:
    encoded = EncodedRow(tuple(ids), None, ())
    places = [index for index, token in enumerate(ids) if token == 1]
    found = bos_violation(parse_row(_ROW), encoded, _oracle("spm-v3"))
    assert found == ("" if places == [0] else f"BOS at tokens {places}; it belongs at token 0 only")


_ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
_LOOKING_BACK = re.compile(r"(?<=\d)[.,:/](?=\d)|(?<!\w)-(?=\d)")


@settings(max_examples=300)
@given(text=st.text(st.sampled_from("05\u0663.,:/-a \u00e9_\n")))
def test_the_signs_of_numbers_are_found(text: str) -> None:
    assert [one.span() for one in _OF_NUMBER.finditer(text)] == [one.span() for one in _LOOKING_BACK.finditer(text)]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_characters_are_dropped_alike(text: str) -> None:
    assert _kept(text) == text.translate(_KEPT)


@given(text=st.lists(st.sampled_from(("[INST]", "</s>", "<", "[", "]", "INST", "a", "\u00e9"))).map("".join))
def test_control_tokens_in_a_text_are_found(text: str) -> None:
    data = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]}
    row = parse_row(data)
    assert _rules().spelled(row) == _rules()._literals.findall(row.to_jsonl())


@cache
def _rules() -> RowRules:
    return RowRules(CheckpointTokenizer(shipped_tokenizer("spm-v3")).oracle)
