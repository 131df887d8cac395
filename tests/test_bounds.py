"""Bounds of what is read, on both sides: a file at the bound is read, and one beyond it is refused."""

from __future__ import annotations

import argparse
import base64
import inspect
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from pytest_mistral_lora import MistralGuard, audit, guard, judge
from pytest_mistral_lora.chat.oracle import hazards
from pytest_mistral_lora.chat.oracle.hazards import json_hazard, pattern_hazard, refuse_damaged
from pytest_mistral_lora.chat.reading import JSON_LIMIT, limits, read_json
from pytest_mistral_lora.chat.templates import renderer
from pytest_mistral_lora.checkpoint import weights
from pytest_mistral_lora.checkpoint.weights import read_header
from pytest_mistral_lora.cli import program
from pytest_mistral_lora.conformance.encoded.agreement import FEWEST_AGREEING
from pytest_mistral_lora.conformance.encoded.columns import value_faults
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.errors import InputError, MistralLoraError, RowError
from pytest_mistral_lora.formats.containers import open_source
from pytest_mistral_lora.plugin import options
from pytest_mistral_lora.plugin import settings as plugin_settings
from pytest_mistral_lora.records.adapter_config import parse_adapter_config, require_supported
from pytest_mistral_lora.records.secrets import redacted
from pytest_mistral_lora.report import compare_reports
from pytest_mistral_lora.runners import configuration
from pytest_mistral_lora.runners.configuration import read_configuration
from pytest_mistral_lora.starter import own_tests
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
        if "default_num_special_tokens" in str(error.place):
            raise


def tekken_setting(name: str, value: int, path: Path) -> None:
    vocab = [{"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode(), "token_str": None} for n in range(256)]
    config = {"default_num_special_tokens": 1, "default_vocab_size": 257, "version": "v3", "pattern": "a"}
    path.write_text(json.dumps({"config": config, "vocab": vocab, "image": {name: value}}))
    refuse_damaged(path)


def tokenizer_json(value: Any, path: Path) -> None:
    if hazard := json_hazard(value):
        raise InputError(hazard, place=str(path))


def padded(tokens: int, path: Path) -> None:
    tokenizer_json({"padding": {"strategy": {"Fixed": tokens}}}, path)


def grown(times: int, path: Path) -> None:
    tokenizer_json({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * times}}, path)


def adapter_of(size: int, path: Path) -> None:
    path.write_bytes(b"{}" + b" " * (size - 2))
    parse_adapter_config(path.read_bytes(), path)


def adapter_levels(levels: int, path: Path) -> None:
    # the value within the innermost list is a level, too
    path.write_text('{"a":' + "[" * (levels - 2) + "1" + "]" * (levels - 2) + "}")
    parse_adapter_config(path.read_bytes(), path)


def adapter_with(path: Path, **keys: Any) -> None:
    require_supported({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]} | keys, str(path))


def recipe_levels(levels: int, path: Path) -> None:
    path.write_text("[" * levels + "]" * levels)
    read_yaml(path)


def named(size: int, path: Path) -> None:
    refused(lambda: TypeAdapter(sections.RecipePath).validate_python("a" * size))


def path_of(size: int, path: Path) -> None:
    refused(
        lambda: TypeAdapter(sections.RecipePath).validate_python(("a" * 99 + "/") * (size // 100) + "b" * (size % 100))
    )


def refused(validate: Callable[[], Any]) -> None:
    try:
        validate()
    except ValidationError as error:
        raise InputError(str(error)) from error


def configuration_levels(levels: int, path: Path) -> None:
    path.write_text("a: " + "[" * (levels - 1) + "]" * (levels - 1))
    read_configuration(path)


def column(name: str, value: Any, path: Path) -> None:
    for fault in value_faults({name: [value]}, 1):
        raise InputError(fault.found, place=str(path))


def template_of(size: int, path: Path) -> None:
    if refusal := renderer._refusal("x" * size):
        raise InputError(refusal, place=str(path))


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
        (partial(tekken_setting, "image_size"), 100_000),
        (partial(tekken_setting, "window_size"), 65_536),
        (partial(tekken_setting, "num_mel_bins"), 1024),
        (padded, 1_000_000),
        (grown, 100),
        (adapter_of, 1 << 20),
        (adapter_levels, 32),
        (lambda rank, path: adapter_with(path, r=rank), 1 << 16),
        (lambda scale, path: adapter_with(path, lora_alpha=scale), 1_000_000),
        (lambda count, path: adapter_with(path, rank_pattern={f"a{n}": 1 for n in range(count)}), 2_000),
        (recipe_levels, 32),
        (named, 255),
        (path_of, 3_800),
        (configuration_levels, 32),
        (partial(column, "sequence_ids"), 2**31 - 1),
        (partial(column, "seq_idx"), 2**31 - 1),
        (partial(column, "assistant_masks"), 1),
        (template_of, 1_000_000),
    ],
    ids=[
        *("json", "recipe", "dimensions", "tensor-name", "tensor-size", "row", "expansion"),
        *("control-tokens", "pattern", "repetitions", "image-size", "audio-window", "mel-bins", "padding", "growth"),
        *("adapter", "adapter-levels", "rank", "alpha", "patterns", "recipe-levels", "file-name", "path"),
        *("configuration-levels", "sequence-ids", "seq-idx", "mask", "template"),
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
    assert FEWEST_AGREEING == 5
    assert "those of 5 rows or more" in RULES["ML508"].why


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
        (guard, {"tokenizer": None, "objective": None, "batches": 8, "on_finding": "stop"}),
        (MistralGuard, {"tokenizer": None, "objective": None, "batches": 8, "on_finding": "stop"}),
        (
            judge,
            {
                "tokenizer": None,
                "base": None,
                "oracle": None,
                "objective": None,
                "train": None,
                "examples": 20,
                "xfails": None,
            },
        ),
        (audit, {"oracle": None, "objective": None, "dataset": ()}),
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
        ("dora", "rslora", "drop_system", "joined", "activation_checkpointing", "share_prefix", "gate"), False
    )


@pytest.mark.parametrize(
    ("name", "least", "below"),
    [
        ("attention_mask", 0, -1),
        ("assistant_masks", 0, -1),
        ("sequence_ids", -1, -2),
        ("loss_weights", 0.0, -5e-324),
        ("loss_weights", -0.0, float("nan")),
        ("loss_weights", 3.4028234663852886e38, 3.402823466385289e38),
    ],
)
def test_a_value_of_a_column_at_its_bound_is_sound(name: str, least: float, below: float, tmp_path: Path) -> None:
    column(name, least, tmp_path)
    with pytest.raises(InputError):
        column(name, below, tmp_path)


def test_a_configuration_has_at_most_so_many_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configuration._MOST_VALUES == 50_000
    monkeypatch.setattr(configuration, "_MOST_VALUES", 50)
    file = tmp_path / "a.yaml"
    # the mapping and the list are values, too
    file.write_text("a: [" + "1," * 48 + "]")
    assert len(read_configuration(file)[0]["a"]) == 48
    file.write_text("a: [" + "1," * 49 + "]")
    with pytest.raises(MistralLoraError):
        read_configuration(file)


def test_a_configuration_has_at_most_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configuration._MOST_BYTES == 1 << 20
    monkeypatch.setattr(configuration, "_MOST_BYTES", 50)
    file = tmp_path / "a.yaml"
    file.write_text("a: 1\n" + "#" * 45)
    assert read_configuration(file)[0] == {"a": 1}
    file.write_text("a: 1\n" + "#" * 46)
    with pytest.raises(MistralLoraError):
        read_configuration(file)


def test_a_short_value_of_the_environment_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "zq8wxkp")
    monkeypatch.setenv("MISTRAL_SERVER_KEY", "zqw")
    assert redacted("zq8wxkp zqw") == "zq8wxkp zqw"
    monkeypatch.setenv("MY_TOKEN", "zq8wxkp1")
    monkeypatch.setenv("MISTRAL_SERVER_KEY", "zqwy")
    assert redacted("zq8wxkp1 zqwy") == "*** ***"


def test_a_comment_that_just_fits_is_whole() -> None:
    line = "x" * 1023
    assert compare_reports._fitting([line] * 64) == [line] * 64
    cut = compare_reports._fitting([line] * 63 + [line + "x"])
    assert cut[-1] == compare_reports._CUT
    assert sum(len(text) + 1 for text in cut) <= 65_536
    # an empty line and the last one with their line breaks
    room = 65_536 - len(compare_reports._CUT) - 2
    assert compare_reports._fitting(["x" * (room - 1), "y" * 65_536])[0] == "x" * (room - 1)
    assert compare_reports._fitting(["x" * room, "y" * 65_536]) == ["", compare_reports._CUT]


def test_test_files_are_sought_in_so_many_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_tests.MOST_FOLDERS == 2_000
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "test_it.py").touch()
    monkeypatch.setattr(own_tests, "MOST_FOLDERS", 4)
    # the folder itself is one of them
    assert [file.parent.name for file in own_tests.find_test_files(tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("words", "at", "beyond"),
    [
        (["check", ".", "--examples"], "1", "0"),
        (["chat", ".", "--max-new-tokens"], "1", "0"),
        (["chat", ".", "--seed"], "0", "-1"),
        (["smoke", ".", "--max-new-tokens"], "1", "0"),
        (["check", ".", "--tokenizer", "spm-v3", "--show"], "0", "-1"),
    ],
)
def test_a_number_of_a_verb_has_its_least_value(
    words: list[str], at: str, beyond: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = program._parser()
    parsed = program._parsed(parser, [*words, at])
    assert getattr(parsed, words[-1][2:].replace("-", "_")) == int(at)
    for value in (beyond, f"{at}.0", ""):
        with pytest.raises(SystemExit) as ended:
            program._parsed(parser, [*words, value])
        assert ended.value.code == 2
    assert words[-1] in capsys.readouterr().err


def test_the_help_of_a_verb_names_the_default_that_it_has() -> None:
    checked = set()
    for verb, parser in _verbs():
        for action in parser._actions:
            named = re.search(r"\(default: (\d+|auto|text|base)\b", action.help or "")
            if named and action.default is not None:
                default = format(action.default, "g") if isinstance(action.default, float) else str(action.default)
                assert default == named[1], (verb, action.option_strings)
                checked.add((verb, action.dest))
            if action.nargs == 0 and action.dest not in ("help", "version"):
                # a switch is off until it is named
                assert action.default in (False, None), (verb, action.option_strings)
    assert {("check", "examples"), ("chat", "seed"), ("chat", "temperature"), ("check", "show")} <= checked


def _verbs() -> list[tuple[str, argparse.ArgumentParser]]:
    [verbs] = (action for action in program._parser()._actions if isinstance(action, argparse._SubParsersAction))
    return list(verbs.choices.items())


def test_the_help_of_the_plugin_names_the_defaults() -> None:
    """The settings without options are compared with the same values in `plugin/test_plugin_options.py`."""
    assert options.EXAMPLES.help.endswith(f"(default: {plugin_settings._DEFAULT_EXAMPLES}).")
    assert f"{plugin_settings._DEVICES[0]} (default)" in options.DEVICE.help
