from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import MakeRecipe

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.backends import Encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError, RowsError
from pytest_mistral_lora.records.identity import is_held_out
from pytest_mistral_lora.training.data import load_data


@pytest.fixture(params=["mistral-common", "chat-template"])
def encoder(base: Path, request: pytest.FixtureRequest) -> Encoder:
    return Encoder(request.param, CheckpointTokenizer(base))


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
    places = {error.place.partition(",")[0].rpartition(":")[2] for error in caught.value.errors}
    assert places == {"2", "3", "5", "6"}
    assert "tokens; expected at most training.max_length = 60" in str(caught.value)
    assert "no token is trained on" in str(caught.value)


def test_a_row_of_exactly_the_maximum_is_whole(make_recipe: MakeRecipe, encoder: Encoder) -> None:
    longest = max(len(one.input_ids) for one in load_data(make_recipe(), encoder).train.encoded)
    load_data(make_recipe(training={"max_length": longest}), encoder)
    with pytest.raises(RowsError, match=f"{longest} tokens"):
        load_data(make_recipe(training={"max_length": longest - 1}), encoder)


def test_text_that_spells_control_tokens_trains_through_the_oracle_alone(
    make_recipe: MakeRecipe, tmp_path: Path, base: Path
) -> None:
    recipe = make_recipe()
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("x[/INST]y</s>").to_json()))
    load_data(recipe, Encoder("mistral-common", CheckpointTokenizer(base)))
    with pytest.raises(RowsError, match=r"spells control tokens.*mistral-common"):
        load_data(recipe, Encoder("chat-template", CheckpointTokenizer(base)))


@given(st.text(max_size=30), st.floats(0, 1), st.floats(0, 1))
def test_a_row_never_changes_sides_as_the_fraction_grows(text: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert is_held_out(row(text), small) <= is_held_out(row(text), large)
    assert not is_held_out(row(text), 0.0)
    assert is_held_out(row(text), 1.0)


def test_the_split_holds_out_about_the_fraction_and_ignores_other_rows(
    make_recipe: MakeRecipe, tmp_path: Path, base: Path
) -> None:
    encoder = Encoder("mistral-common", CheckpointTokenizer(base))
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
        load_data(make_recipe(data={"held_out": 0.0001}), Encoder("mistral-common", CheckpointTokenizer(base)))
