"""Bounds of what is read, on both sides: a file at the bound is read, and one beyond it is refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from pytest_mistral_lora import MistralGuard, audit, guard, judge
from pytest_mistral_lora.chat.oracle import hazards
from pytest_mistral_lora.chat.oracle.hazards import pattern_hazard, refuse_damaged
from pytest_mistral_lora.chat.reading import JSON_LIMIT, limits, read_json
from pytest_mistral_lora.checkpoint import weights
from pytest_mistral_lora.checkpoint.weights import read_header
from pytest_mistral_lora.errors import InputError, MistralLoraError, RowError
from pytest_mistral_lora.formats.containers import open_source
from pytest_mistral_lora.training.recipe import data, reading, sections, settings
from pytest_mistral_lora.training.recipe.reading import read_yaml
from pytest_mistral_lora.training.recipe.sections import Section


def json_of(size: int, path: Path) -> Any:
    path.write_bytes(b"[]" + b" " * (size - 2))
    return read_json(path)


def yaml_of(size: int, path: Path) -> Any:
    path.write_text("a: 1\n" + "#" * (size - 5))
    return read_yaml(path)


def yaml_values(count: int, path: Path) -> Any:
    # the list is a value, too
    path.write_text("[" + "1," * (count - 1) + "]")
    return read_yaml(path)


def header(path: Path, **entry: Any) -> Any:
    name = entry.pop("name", "t")
    text = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} | entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return read_header(path)


def row_of(size: int, path: Path) -> Any:
    empty = len(json.dumps({"messages": ""}))
    path.write_text(json.dumps({"messages": "x" * (size - empty)}) + "\n")
    [record] = open_source(path).records(lambda read: None)
    if isinstance(record.value, RowError):
        raise record.value
    return record.value


def expanded(times: int, path: Path) -> None:
    path.write_bytes(b"12345")
    limits.Expansion(path).count(times)


def tekken_with(count: int, path: Path) -> None:
    path.write_text(json.dumps({"config": {"default_num_special_tokens": count}, "vocab": []}))
    try:
        refuse_damaged(path)
    except MistralLoraError as error:
        # the file lacks all that comes after this key
        if "default_num_special_tokens" in error.place:
            raise


def pattern_of(size: int, path: Path) -> None:
    if hazard := pattern_hazard("a" * size):
        raise InputError(hazard, place=str(path))


def repeated(times: int, path: Path) -> None:
    if hazard := pattern_hazard(f"a{{{times}}}"):
        raise InputError(hazard, place=str(path))


@pytest.mark.parametrize(
    ("read", "most"),
    [
        (json_of, JSON_LIMIT),
        (yaml_of, reading._MOST_BYTES),
        (lambda count, path: header(path, shape=[0] * count), weights._MOST_DIMENSIONS),
        (lambda size, path: header(path, name="t" * size), weights._LONGEST_NAME),
        (lambda size, path: header(path, shape=[0, size]), weights._LARGEST_SIZE),
        (row_of, limits.MAX_ROW_BYTES),
        (expanded, limits._ALWAYS + 5 * limits._RATIO),
        (tekken_with, hazards._MAX_SPECIAL),
        (pattern_of, hazards._MAX_PATTERN),
        (repeated, hazards._MAX_REPETITIONS),
    ],
    ids=[
        *("json", "recipe", "dimensions", "tensor-name", "tensor-size", "row", "expansion"),
        *("control-tokens", "pattern", "repetitions"),
    ],
)
def test_a_file_at_its_bound_is_read_and_one_beyond_is_refused(
    read: Callable[[int, Path], Any], most: int, tmp_path: Path
) -> None:
    read(most, tmp_path / "at.jsonl" if read is row_of else tmp_path / "at.json")
    with pytest.raises(MistralLoraError):
        read(most + 1, tmp_path / "beyond.jsonl" if read is row_of else tmp_path / "beyond.json")


def test_a_recipe_has_at_most_so_many_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reading._MOST_VALUES == 50_000
    # reading so many takes seconds
    monkeypatch.setattr(reading, "_MOST_VALUES", 50)
    assert len(yaml_values(50, tmp_path / "at.yaml")[0]) == 49
    with pytest.raises(MistralLoraError):
        yaml_values(51, tmp_path / "beyond.yaml")


def test_the_bounds_are_what_the_pages_and_their_comments_say() -> None:
    """A bound that moves by a factor is a decision, and no slip."""
    assert (JSON_LIMIT, limits.MAX_ROW_BYTES, reading._MOST_BYTES) == (16 << 20, 20 << 20, 1 << 20)
    assert (weights._MOST_DIMENSIONS, weights._LARGEST_SIZE) == (64, 2**63 - 1)
    assert (limits._ALWAYS, limits._RATIO) == (1 << 30, 1000)


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [(sections.Positive, 1, 2**31 - 1), (sections.NonNegative, 0, 2**31 - 1), (sections.Seed, 0, 2**32 - 1)],
)
def test_a_number_of_a_recipe_has_its_bounds(kind: Any, least: int, most: int) -> None:
    number: TypeAdapter[int] = TypeAdapter(kind)
    assert [number.validate_python(value) for value in (least, most)] == [least, most]
    for value in (least - 1, most + 1, True, str(least), float(most)):
        with pytest.raises(ValidationError):
            number.validate_python(value)


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (guard, {"tokenizer": None, "batches": 8, "on_finding": "stop"}),
        (MistralGuard, {"tokenizer": None, "batches": 8, "on_finding": "stop"}),
        (judge, {"tokenizer": None, "base": None, "oracle": None, "train": None, "examples": 20, "xfails": None}),
        (audit, {"oracle": None, "dataset": ()}),
    ],
)
def test_a_public_function_has_the_defaults_that_its_page_says(
    function: Callable[..., Any], defaults: dict[str, Any]
) -> None:
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in defaults} == defaults


def test_the_switches_of_a_recipe_are_off_until_they_are_set() -> None:
    """Each changes what is trained, or costs time. The page of recipes names the same default for each."""
    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    defaults = {}
    for section in (*Section.__subclasses__(), sections.Lora, settings.Training, data.SourceLayout):
        switches = {name: field.default for name, field in section.model_fields.items() if type(field.default) is bool}
        defaults |= switches
        assert all(f"| `{name}` | `{str(value).lower()}` |" in page for name, value in switches.items())
    assert defaults == dict.fromkeys(
        ("dora", "rslora", "drop_system", "joined", "activation_checkpointing", "share_prefix"), False
    )
