"""The YAML of a recipe: whatever a file holds, it is read as plain data or refused with its place, within bounds."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import GOOD

from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.recipe import load_recipe


def test_a_key_that_appears_twice_is_an_error(recipe_file: Path) -> None:
    recipe_file.write_text(f"{GOOD}output: elsewhere\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:11: the key 'output' appears twice"):
        load_recipe(recipe_file)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{letter}: &{letter} [{', '.join([f'*{before}'] * 8)}]\n"
    for before, letter in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("? [a, b]\n: 1\n", "1: the key is a sequence; expected a text as key"),
        ("? {a: b}\n: 1\n", "1: the key is a mapping"),
        ("card:\n  2024: x\n", "2, card: the key is '2024'; expected a text in quotes as key"),
        ("on: x\n", "1: the key is 'on'"),
        ("card: " + "[" * 40 + "]" * 40, "1: more than 32 levels deep"),
        ("card: " + "[" * 100_000, "1: more than 32 levels deep"),
        ("card:\n  a: &a\n    - *a\n", "2, card.a.0: refers to itself"),
        (LAUGHS, "1: more than 50,000 values, aliases included"),
        ("card: !!binary aGk=\n", "1, card: has the type tag:yaml.org,2002:binary"),
        ("card: !!set {a, b}\n", "1, card: has the type tag:yaml.org,2002:set"),
        ("card: {x: .nan}\n", "1, card.x: nan: not a finite number"),
        ("card: {x: .inf}\n", "1, card.x: inf: not a finite number"),
        (f"card:\n  x: 1{'0' * 19}\n", "2, card.x: 10000000000000000000: more than 64 bits"),
        (f"card: {{x: {'9' * 5000}}}\n", "1, card.x: '9999"),
        (f"card: {{x: 0x{'f' * 9000}}}\n", "1, card.x: '0xffff"),
        (f"card: {{x: 1{':1' * 100_000}}}\n", "1, card.x: '1:1:1"),
        (f"card: {{x: 1{':1' * 1000}.5}}\n", "1, card.x: '1:1:1"),
        ('card: {x: "\\0"}\n', "1, card.x: '\\x00': a null character"),
        ('card: {x: "\\uD800"}\n', "1, card.x: '\\ud800': "),
        ("a: b: c\n", "1: not valid YAML: mapping values are not allowed here"),
        ("a: \x07\n", ": not valid YAML: unacceptable character"),
        ("x: 1\n" * 250_000, ": has more than 1,048,576 bytes"),
    ],
    ids=range(22),
)
def test_yaml_that_is_no_recipe_is_refused_with_its_line(recipe_file: Path, text: str, found: str) -> None:
    recipe_file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file)
    assert str(caught.value).startswith(f"{recipe_file}{'' if found[0] == ':' else ':'}{found}")
    assert len(str(caught.value)) < 500


def test_reused_and_merged_sections_and_dates_are_plain_data(recipe_file: Path) -> None:
    recipe_file.write_text(
        "base: &base {repo: a/b, revision: &pin e0bc86c23ce5aae1db576c8cca6f06f1f73af2db}\n"
        "data: {train: [rows.jsonl]}\n"
        "training: {<<: {steps: 3, seed: 1}, seed: 2}\n"
        "card: {date: 2024-01-02, again: *pin, letters: é😀}\noutput: out\n",
        encoding="utf-8",
    )
    recipe = load_recipe(recipe_file)
    assert (recipe.training.steps, recipe.training.seed) == (3, 2)
    assert recipe.card == {"date": "2024-01-02", "again": recipe.base.revision, "letters": "é😀"}


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe.yaml", "zero.yaml", "."):
        with pytest.raises(RecipeError, match="is not a file"):
            load_recipe(tmp_path / name)


FULL = (
    GOOD
    + """backend: chat-template
lora: {r: 8, alpha: 16, dropout: 0.1, target_modules: [q_proj, v_proj], rslora: true, modules_to_save: [lm_head]}
evaluation: {generations: 2, checks: [json, eos, {max_tokens: 9}, {regex: a+}, {json_schema: a.json}]}
card: {license: mit, tags: [a, {b: [1, 2.5, null, 2024-01-01]}]}
"""
)
PIECES = [
    "[",
    "]",
    "{",
    "}",
    ":",
    ": ",
    "- ",
    "&a ",
    "*a",
    "<<: ",
    "? ",
    "|",
    ">",
    "!!set ",
    "!!int ",
    "!x ",
    "\n",
    "  ",
]
VALUES = [
    "''",
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    ".nan",
    "9" * 25,
    "0x" + "f" * 40,
    "1:30",
    "[]",
    "{}",
    "~x/y",
    '"\\0"',
]


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_is_changed_in_a_recipe_it_is_read_or_refused(tmp_path_factory: Any, data: st.DataObject) -> None:
    text = FULL
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.sampled_from([0, 0, 1, 5, 40])))
        put = data.draw(st.sampled_from([*PIECES, *VALUES]) | st.text(max_size=8))
        # a value as a whole, as often as any piece of text
        value = re.compile(r"(?<=: )[^\s,{}\[\]]+").search(text, start) if data.draw(st.booleans()) else None
        text = text[: value.start()] + put + text[value.end() :] if value else text[:start] + put + text[end:]
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(RecipeError):
        recipe = load_recipe(file)
        json.dumps(recipe.as_written(), allow_nan=False).encode()


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: b: c", "!!python/object/apply:os.getcwd []", "\x00"])
def test_what_is_not_a_mapping_is_an_error(recipe_file: Path, text: str) -> None:
    recipe_file.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(recipe_file)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")
