"""The folders that trainers prepared: how their rows are compared, and what is recorded of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from boards import prepared
from boards.prepared import compared

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row

Data = dict[str, Any]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


def row_of(*texts: str) -> Row:
    roles = ("user", "assistant") * len(texts)
    return parse_row({"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]})


ROWS = {"plain": row_of("Hi", "Hello"), "lost": row_of("Hi", "Hello", "Bye", "See you"), "cut": row_of("Go on", "One")}


def save(oracle: Oracle, kept: Path) -> None:
    """Save what a trainer makes of the rows: one is right, one has lost a turn, one is cut in its question."""
    plain, lost, cut = (oracle.encode(row) for row in (ROWS["plain"], row_of("Bye", "See you"), ROWS["cut"]))
    made = [(2, cut.input_ids[:3], cut.labels[:3]), (0, plain.input_ids, plain.labels)]
    as_columns(made).save_to_disk(kept / "0" / "hash")
    # a row alone is given twice
    as_columns([(1, lost.input_ids, lost.labels), (-1, lost.input_ids, lost.labels)]).save_to_disk(kept / "1" / "train")


def as_columns(rows: list[Any]) -> datasets.Dataset:
    keys = ("mistral_lora_row", "input_ids", "labels")
    return datasets.Dataset.from_list([dict(zip(keys, row, strict=True)) for row in rows])


def test_rows_are_counted_by_their_verdicts_with_and_without_messages(oracle: Oracle, tmp_path: Path) -> None:
    save(oracle, tmp_path)
    found = compared(tmp_path, ROWS, oracle)
    counts = {key: found[key] for key in ("rows", "prepared", "sound", "same", "other", "not_checked")}
    assert counts == {"rows": 3, "prepared": 3, "sound": 1, "same": 1, "other": 1, "not_checked": 1}
    assert sorted(found["differences"].values()) == [[1, "cut"], [1, "lost"]]
    assert "ML533 → sound" in found["differences"]


def recorded() -> list[Any]:
    return [
        pytest.param(data[kind], id=f"{name}-{tokenizer}-{kind}")
        for name, tokenizers in prepared.read().items()
        for tokenizer, data in tokenizers.items()
        for kind in ("packaged", "real")
        if "prepared" in data[kind]
    ]


@pytest.mark.parametrize("data", recorded())
def test_every_prepared_row_is_counted_and_no_sound_one_is_accused(data: Data) -> None:
    assert data["same"] + data["other"] + data["not_checked"] == data["prepared"] <= data["rows"]
    assert sum(count for count, *_ in data["differences"].values()) == data["other"] + data["not_checked"]
    accused = [names for difference, (_, *names) in data["differences"].items() if difference.startswith("sound →")]
    # docs/prepared.md names it: U+2581 at the end of an answer
    assert accused in ([], [["sentencepiece-space"]])


def test_the_trainers_that_ran_are_recorded() -> None:
    ran = {name.partition("-")[0] for name, tokenizers in prepared.read().items() if tokenizers}
    assert {"trl", "axolotl", "llamafactory", "ms"} <= ran


def test_a_folder_without_ids_is_recorded_as_one(oracle: Oracle, tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"messages": [], "lengths": [3], "mistral_lora_row": 0}]).save_to_disk(tmp_path / "0")
    assert compared(tmp_path, ROWS, oracle) == {"columns": ["lengths", "messages"]}
