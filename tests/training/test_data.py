from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from many_rows import encoder_of, numbered, recipe_of, said, write_lines
from tiny_runs import MakeRecipe

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.encoder import Encoder, make_encoder
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError, RowsError
from pytest_mistral_lora.records.data_stats import SHOWN
from pytest_mistral_lora.records.files import is_held_out
from pytest_mistral_lora.training.rows import RowDataset
from pytest_mistral_lora.training.rows.loading import RunData, Split, load_data


@pytest.fixture(params=["mistral-common", "chat-template"])
def encoder(base: Path, request: pytest.FixtureRequest) -> Encoder:
    return make_encoder(request.param, CheckpointTokenizer(base))


def row(text: str, **assistant: int) -> Row:
    return Row(({"role": "user", "content": text}, {"role": "assistant", "content": "Yes.", **assistant}))


def test_rows_become_the_oracles_ids_and_labels(make_recipe: MakeRecipe, encoder: Encoder) -> None:
    data = load_data(make_recipe(), encoder)
    assert len(data.train.rows) == 5
    for one, encoded in zip(data.train.rows, data.train.encoded, strict=True):
        expected = encoder.tokenizer.oracle.encode(one)
        assert (encoded.input_ids, encoded.labels) == (expected.input_ids, expected.labels)


def test_prompt_is_what_the_last_assistant_turn_follows(make_recipe: MakeRecipe, encoder: Encoder) -> None:
    for one in load_data(make_recipe(), encoder).train.rows:
        assert encoder.prompt(one) == encoder.tokenizer.oracle.encode_prompt(one)


def test_every_bad_row_is_named_in_one_error(make_recipe: MakeRecipe, tmp_path: Path, encoder: Encoder) -> None:
    recipe = make_recipe(training={"max_length": 60})
    good = json.dumps(row("Hi").to_json())
    lines = [
        good,
        "{",
        json.dumps(row("long " * 60).to_json()),
        good,
        json.dumps(row("Hi", weight=0).to_json()),
        json.dumps({"messages": [{"role": "robot", "content": "x"}]}),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(RowsError) as caught:
        load_data(recipe, encoder)
    places = {error.place.record for error in caught.value.errors}
    assert places == {2, 3, 5, 6}
    assert "expected at most training.max_length = 60" in str(caught.value)
    assert "no token is trained on" in str(caught.value)


def test_text_that_spells_control_tokens_trains_through_the_oracle_alone(
    make_recipe: MakeRecipe, tmp_path: Path, base: Path
) -> None:
    recipe = make_recipe()
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("x[/INST]y</s>").to_json()))
    load_data(recipe, make_encoder("mistral-common", CheckpointTokenizer(base)))
    with pytest.raises(RowsError, match=r"spells control tokens.*mistral-common"):
        load_data(recipe, make_encoder("chat-template", CheckpointTokenizer(base)))


@given(st.text(max_size=30), st.floats(0, 1), st.floats(0, 1))
def test_a_row_never_changes_sides_as_the_fraction_grows(text: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert is_held_out(row(text), small) <= is_held_out(row(text), large)
    assert not is_held_out(row(text), 0.0)
    assert is_held_out(row(text), 1.0)


def test_the_split_holds_out_about_the_fraction_and_ignores_other_rows(
    make_recipe: MakeRecipe, tmp_path: Path, base: Path
) -> None:
    encoder = make_encoder("mistral-common", CheckpointTokenizer(base))
    lines = [json.dumps(row(f"Number {number}").to_json()) for number in range(400)]
    recipe = make_recipe(data={"held_out": 0.25})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    whole = load_data(recipe, encoder)
    assert 70 < len(whole.held_out.rows) < 130
    assert len(whole.train.rows) + len(whole.held_out.rows) == 400
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[::-2], lines[0], lines[0]]))
    half = load_data(recipe, encoder)
    assert set(map(Row.to_jsonl, half.train.rows)) <= set(map(Row.to_jsonl, whole.train.rows))
    assert set(map(Row.to_jsonl, half.held_out.rows)) <= set(map(Row.to_jsonl, whole.held_out.rows))


def test_a_split_that_holds_out_nothing_is_an_error(make_recipe: MakeRecipe, base: Path) -> None:
    with pytest.raises(InputError, match="holds out none"):
        load_data(make_recipe(data={"held_out": 0.0001}), make_encoder("mistral-common", CheckpointTokenizer(base)))


LINES = [
    said("Hi", "Yes."),
    said("Hi", "Yes.", weight=0),
    said("Hi", "long " * 60),
    said("long " * 60, "Yes."),
    said("Hi", "No."),
]


def policies(folder: Path, held_out: int = 0, **training: Any) -> RunData:
    lines = LINES[held_out:]
    write_lines(folder / "rows.jsonl", lines)
    write_lines(folder / "more.jsonl", LINES[:held_out])
    recipe = recipe_of(folder, data={"eval": ["more.jsonl"]} if held_out else {}, max_length=30, **training)
    return load_data(recipe, encoder_of())


def numbers(data: RunData) -> list[int]:
    return [row.place.record for row in data.train.rows]


@pytest.mark.parametrize(
    ("truncation", "unsupervised", "used", "changes"),
    [
        ("drop", "drop", [1, 5], {"too-long": 2, "nothing-supervised": 1}),
        ("drop", "warn", [1, 2, 5], {"too-long": 2, "without-loss": 1}),
        ("right", "drop", [1, 3, 5], {"cut": 1, "nothing-supervised": 2}),
        ("right", "warn", [1, 2, 3, 4, 5], {"cut": 2, "without-loss": 2}),
    ],
)
def test_what_the_policies_remove_is_counted_and_said(
    truncation: str,
    unsupervised: str,
    used: list[int],
    changes: dict[str, int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = policies(tmp_path, truncation=truncation, unsupervised=unsupervised)
    tally, oracle = data.train.figures.tally, encoder_of().tokenizer.oracle
    whole = [oracle.encode(one) for one in LINES]
    assert numbers(data) == used
    assert [one.input_ids for one in data.train.encoded] == [whole[number - 1].input_ids[:30] for number in used]
    assert [one.labels for one in data.train.encoded] == [(whole[number - 1].labels or ())[:30] for number in used]
    assert (tally.rows, tally.used, dict(tally.changes)) == (5, len(used), changes)
    assert tally.tokens == data.train.lengths.sum()
    assert tally.tokens + tally.tokens_removed == sum(len(one.input_ids) for one in whole)
    assert tally.supervised_tokens + tally.supervised_tokens_removed == sum(one.supervised_tokens for one in whole)
    assert f"rows to train on: {len(used)} of 5 rows are used" in caplog.text
    assert f"removed: {tally.tokens_removed} tokens, {tally.supervised_tokens_removed} of them with loss" in caplog.text
    for change, number in changes.items():
        assert len(tally.places[change]) == number
        assert all(f"{tmp_path / 'rows.jsonl'}:{line}" in caplog.text for _, line in tally.places[change])


@pytest.mark.parametrize(
    ("chosen", "bad"),
    [
        ({}, [2, 3, 4]),
        ({"truncation": "drop"}, [2]),
        ({"truncation": "right"}, [2, 4]),
        ({"unsupervised": "drop"}, [3, 4]),
        ({"unsupervised": "warn"}, [3, 4]),
    ],
    ids=str,
)
def test_what_no_policy_allows_is_an_error_that_names_the_row(
    chosen: dict[str, str], bad: list[int], tmp_path: Path
) -> None:
    with pytest.raises(RowsError) as caught:
        policies(tmp_path, **chosen)
    assert [str(error.place) for error in caught.value.errors] == [f"{tmp_path / 'rows.jsonl'}:{line}" for line in bad]


def test_rows_that_are_used_as_they_are_leave_the_log_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path / "rows.jsonl", [LINES[0], LINES[4]])
    load_data(recipe_of(tmp_path, truncation="right", unsupervised="drop"), encoder_of())
    assert caplog.text == ""


def test_one_process_of_a_run_speaks_for_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    policies(tmp_path, truncation="drop", unsupervised="drop")
    assert caplog.text == ""


def test_held_out_rows_are_counted_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = policies(tmp_path, held_out=3, truncation="drop", unsupervised="drop")
    assert (data.held_out.figures.tally.rows, data.held_out.figures.tally.used) == (3, 1)
    assert dict(data.train.figures.tally.changes) == {"too-long": 1}
    assert "held-out rows: 1 of 3 rows are used" in caplog.text


def test_policies_that_leave_nothing_are_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", LINES[1:2])
    with pytest.raises(InputError, match="no row is left to train on"):
        load_data(recipe_of(tmp_path, unsupervised="drop"), encoder_of())
    write_lines(tmp_path / "more.jsonl", LINES[:1])
    recipe = recipe_of(tmp_path, data={"train": ["more.jsonl"], "eval": ["rows.jsonl"]}, unsupervised="drop")
    with pytest.raises(InputError, match="each of 1 held-out rows is dropped"):
        load_data(recipe, encoder_of())


def test_places_of_many_rows_are_counted_and_the_first_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_lines(tmp_path / "rows.jsonl", [*LINES[:1], *LINES[1:2] * 40])
    data = load_data(recipe_of(tmp_path, unsupervised="drop"), encoder_of())
    assert data.train.figures.tally.changes["nothing-supervised"] == 40
    assert f"40 dropped, no token is trained on: {tmp_path / 'rows.jsonl'}:2," in caplog.text
    assert f", and {40 - SHOWN} more" in caplog.text


def test_what_was_read_is_known_of_each_file(tmp_path: Path) -> None:
    data = policies(tmp_path, held_out=3, truncation="drop", unsupervised="drop")
    assert [(one.path.name, one.is_held_out, one.rows) for one in data.files] == [
        ("rows.jsonl", False, 2),
        ("more.jsonl", True, 3),
    ]
    assert [one.sha256 for one in data.files] == [sha256_file(one.path) for one in data.files]


def test_rows_are_sequences_of_the_usual_kind(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", numbered(300))
    data = load_data(recipe_of(tmp_path), encoder_of())
    rows, encoded = list(data.train.rows), list(data.train.encoded)
    for lazy, whole in ((data.train.rows, rows), (data.train.encoded, encoded)):
        assert (len(lazy), lazy[-1], lazy[2:5]) == (300, whole[-1], tuple(whole[2:5]))
        with pytest.raises(IndexError):
            lazy[300]
    assert data.train.lengths.tolist() == [len(one.input_ids) for one in encoded]
    assert data.train.figures.tally.supervised_tokens == sum(one.supervised_tokens for one in encoded)
    assert Split(rows, encoded).figures == data.train.figures
    assert Split(rows[1:], encoded[1:]).lengths.tolist() == data.train.lengths.tolist()[1:]


def test_a_dataset_reads_lists_and_tables_alike_and_crosses_processes(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", numbered(20))
    encoded = load_data(recipe_of(tmp_path), encoder_of()).train.encoded
    for dataset in (RowDataset(encoded), RowDataset(list(encoded)), pickle.loads(pickle.dumps(RowDataset(encoded)))):
        assert len(dataset) == 20
        for index in (0, 7, 19):
            item = dataset[index]
            assert item.pop("row") == index
            assert {name: value.tolist() for name, value in item.items()} == {
                "input_ids": list(encoded[index].input_ids),
                "labels": list(encoded[index].labels or ()),
            }
            assert {value.dtype for value in item.values()} == {np.dtype("int64")}
