from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.records.data_stats import probe_sha256

OLD, NEW = shipped_tokenizer("spm-v1"), shipped_tokenizer("spm-v3")


def test_the_same_tokenizer_gives_the_same_hash_and_another_another() -> None:
    assert probe_sha256(Oracle(NEW).encode) == probe_sha256(Oracle(NEW).encode)
    assert probe_sha256(Oracle(NEW).encode) != probe_sha256(Oracle(OLD).encode)


@pytest.mark.parametrize("where", range(4))
def test_one_moved_token_in_any_conversation_is_another_hash(where: int) -> None:
    seen = 0

    def moved(row: Row) -> EncodedRow:
        nonlocal seen
        encoded, seen = Oracle(NEW).encode(row), seen + 1
        return (
            replace(encoded, input_ids=(*encoded.input_ids[:-2], 5, encoded.input_ids[-1]))
            if seen == where + 1
            else encoded
        )

    assert probe_sha256(moved) != probe_sha256(Oracle(NEW).encode)
    assert seen == 4


def test_a_conversation_that_is_refused_counts_as_such() -> None:
    def refusing(row: Row) -> EncodedRow:
        if row.tools:
            raise RowError("no tools here")
        return Oracle(NEW).encode(row)

    assert probe_sha256(refusing) != probe_sha256(Oracle(NEW).encode)
