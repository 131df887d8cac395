from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from option_values import BAD, BAD_INI, DEFAULTS, GOOD, NEEDS, NO_CUDA, RECIPE

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.cli import program
from pytest_mistral_lora.conformance.check_options import CheckOptions
from pytest_mistral_lora.judging import judge
from pytest_mistral_lora.plugin.options import OPTIONS
from pytest_mistral_lora.plugin.settings import PluginSettings

Read = Callable[..., PluginSettings]
Run = Callable[..., pytest.RunResult]


@pytest.fixture
def here(pytester: pytest.Pytester) -> Path:
    shutil.copy(shipped_tokenizer("spm-v3"), pytester.path / "tok.model.v3")
    for folder in ("own", "bare", "folder.json"):
        pytester.mkdir(folder)
    (pytester.path / "own" / "rows.jsonl").touch()
    (pytester.path / "known.txt").write_text("ML204  # looked at\n")
    (pytester.path / "recipe.yaml").write_text(RECIPE)
    return pytester.path


def _refusal(result: pytest.RunResult) -> str:
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    return result.stderr.str().strip()


def values_of(settings: PluginSettings) -> dict[str, Any]:
    """Return each setting by its name, those of the check options among them."""
    return {name: getattr(settings, name) for name in settings.__slots__ if name != "options"} | vars(settings.options)


def test_without_options_the_settings_are_the_defaults(settings_of: Read) -> None:
    assert values_of(settings_of()) == DEFAULTS


@pytest.mark.of_field
@pytest.mark.parametrize("flag", GOOD)
def test_a_good_option_changes_its_setting_alone(flag: str, here: Path, settings_of: Read) -> None:
    value, name, expected = GOOD[flag]
    needs, needed = NEEDS.get(flag, ((), ""))
    values = values_of(settings_of(flag, *([value] if value else []), *needs))
    changed = {name: value for name, value in values.items() if value != DEFAULTS[name]}
    for one in needed.split():
        changed.pop(one, None)
    assert changed == {name: expected(Path())}


@pytest.mark.of_field
@pytest.mark.parametrize("option", [option for option in OPTIONS if option.ini], ids=lambda option: option.ini)
def test_a_good_ini_value_does_what_the_option_does(
    option: Any, here: Path, settings_of: Read, pytester: pytest.Pytester
) -> None:
    value, name, expected = GOOD[option.flag]
    pytester.makeini(f"[pytest]\n{option.ini} = {value or 'true'}")
    assert values_of(settings_of(*NEEDS.get(option.flag, ((), ""))[0]))[name] == expected(Path())


def test_a_workflow_of_github_gets_annotations(settings_of: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert settings_of().output_format == "github"
    assert settings_of("--mistral-output-format=text").output_format == "text"


def test_every_option_is_tried_here() -> None:
    assert {option.flag for option in OPTIONS} == {*GOOD, "--mistral-golden", "--mistral-golden-update"}


def test_pytest_check_and_judge_have_one_word_for_each_check_option() -> None:
    [verbs] = [one for one in program._parser()._actions if isinstance(one, argparse._SubParsersAction)]
    of_check = {flag[2:].replace("-", "_") for flag in verbs.choices["check"]._option_string_actions}
    of_pytest = {option.dest.removeprefix("mistral_").replace("no_train", "train") for option in OPTIONS}
    decided = {field.name for field in dataclasses.fields(CheckOptions)}
    assert decided - of_pytest == set()
    # a check of these verbs is the same each time, on the device that is there
    assert decided - of_check == decided - set(signature(judge).parameters) == {"seed", "device"}


def test_an_option_may_be_repeated(here: Path, settings_of: Read) -> None:
    shutil.copy(here / "tok.model.v3", here / "other.model.v3")
    settings = settings_of("--mistral-tokenizer", "tok.model.v3", "--mistral-tokenizer", "other.model.v3")
    assert settings.tokenizers == (Path("tok.model.v3"), Path("other.model.v3"))


def _assert_refused(result: pytest.RunResult, source: str, *values: str) -> None:
    refusal = _refusal(result)
    assert refusal.startswith(f"ERROR: {source}: ")
    assert [value for value in values if value not in refusal] == []


@pytest.mark.of_field
@pytest.mark.parametrize(("flag", "value", "found"), BAD)
def test_a_bad_option_is_a_usage_error_that_names_it(
    flag: str, value: str, found: tuple[str, ...], here: Path, golden: Run
) -> None:
    _assert_refused(golden(f"{flag}={value}"), flag, *found)


@pytest.mark.of_field
@pytest.mark.parametrize(("line", "found"), BAD_INI)
def test_a_bad_ini_value_is_a_usage_error_that_names_key_and_file(
    line: str, found: tuple[str, ...], here: Path, golden: Run, pytester: pytest.Pytester
) -> None:
    file = pytester.makeini(f"[pytest]\n{line}")
    _assert_refused(golden(), f"{line.partition(' ')[0]} in {file}", *found)


def test_a_manifest_is_required_by_the_ini_file(settings_of: Read, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmistral_require_manifest = true")
    assert settings_of().require_manifest


def test_encoded_rows_need_a_tokenizer_to_be_held_to(here: Path, golden: Run) -> None:
    added = ("--mistral-tokenizer PATH", "--mistral-recipe PATH")
    _assert_refused(golden("--mistral-encoded=own/rows.jsonl"), "--mistral-encoded", "no tokenizer", *added)


def test_rows_of_a_server_need_a_server(here: Path, golden: Run) -> None:
    refusal = _refusal(golden("--mistral-server-rows=own/rows.jsonl"))
    assert refusal.startswith("ERROR: --mistral-server-rows ")
    assert "add --mistral-server URL" in refusal


def test_answers_of_a_server_need_a_server(here: Path, golden: Run) -> None:
    refusal = _refusal(golden("--mistral-server-answers"))
    assert refusal.startswith("ERROR: --mistral-server-answers ")
    assert "add --mistral-server URL" in refusal


def test_a_limit_of_requests_needs_a_running_server(here: Path, golden: Run) -> None:
    for more in ((), ("--mistral-server", f"vllm-parsers={sys.executable}", "--mistral-tokenizer", "tok.model.v3")):
        refusal = _refusal(golden("--mistral-server-request-seconds=600", *more))
        assert refusal.startswith("ERROR: --mistral-server-request-seconds is for a running server")


def test_a_base_needs_an_adapter(here: Path, golden: Run) -> None:
    refusal = _refusal(golden("--mistral-base=own"))
    assert refusal.startswith("ERROR: --mistral-base ")
    assert "add --mistral-adapter PATH" in refusal


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without CUDA")
@pytest.mark.parametrize("source", ["--mistral-device", "mistral_device"])
def test_cuda_without_cuda_is_a_usage_error(source: str, golden: Run, pytester: pytest.Pytester) -> None:
    if source.startswith("--"):
        _assert_refused(golden(source, "cuda"), source, *NO_CUDA)
    else:
        file = pytester.makeini(f"[pytest]\n{source} = cuda")
        _assert_refused(golden(), f"{source} in {file}", *NO_CUDA)


@pytest.mark.parametrize(
    ("option", "line"),
    [
        (("--mistral-examples", "7"), "mistral_examples = 5"),
        (("--mistral-device", "cpu"), "mistral_device = tpu"),
        (("--mistral-tokenizer", "tok.model.v3"), "mistral_tokenizers = nope"),
        (("--mistral-golden-dir", "own"), "mistral_golden_dirs = nope"),
        (("--mistral-fail-on", "note,not-checked"), "mistral_fail_on = note"),
    ],
)
def test_the_command_line_replaces_the_ini_value(
    option: tuple[str, ...], line: str, here: Path, settings_of: Read, pytester: pytest.Pytester
) -> None:
    pytester.makeini(f"[pytest]\n{line}")
    _, name, expected = GOOD[option[0]]
    assert values_of(settings_of(*option))[name] == expected(Path())


def test_ini_paths_are_relative_to_the_ini_file_and_options_to_the_current_folder(
    here: Path, settings_of: Read, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]\nmistral_tokenizers = tok.model.v3")
    monkeypatch.chdir(here / "own")
    assert settings_of().tokenizers == (here / "tok.model.v3",)
    assert settings_of("--mistral-golden-dir", ".").golden_folders == (Path(),)


def test_an_ini_value_may_list_several_paths(here: Path, settings_of: Read, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmistral_tokenizers =\n    tok.model.v3\n    own")
    assert settings_of().tokenizers == (Path("tok.model.v3"), Path("own"))


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest reads [tool.pytest] from version 9 on")
def test_values_of_native_toml_have_their_own_types(here: Path, settings_of: Read, pytester: pytest.Pytester) -> None:
    text = '[tool.pytest]\nmistral_examples = 7\nmistral_server_answers = false\nmistral_tokenizers = ["tok.model.v3"]'
    pytester.makepyprojecttoml(text)
    settings = settings_of()
    assert (settings.options.examples, settings.server_answers) == (7, False)
    assert settings.tokenizers == (Path("tok.model.v3"),)


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest reads [tool.pytest] from version 9 on")
@pytest.mark.parametrize("line", ['mistral_examples = "7"', 'mistral_allow_code = "yes"', 'mistral_tokenizers = "a"'])
def test_a_value_of_another_toml_type_is_a_usage_error(line: str, golden: Run, pytester: pytest.Pytester) -> None:
    file = pytester.makepyprojecttoml(f"[tool.pytest]\n{line}")
    refusal = _refusal(golden())
    assert refusal.startswith(f"ERROR: {line.partition(' ')[0]} in {file}: ")
    assert line.partition('"')[2].rstrip('"') in refusal


@pytest.mark.parametrize("flag", [option.flag for option in OPTIONS if option.flag != "--mistral-golden"])
def test_an_option_without_the_suite_is_a_usage_error(flag: str, here: Path, pytester: pytest.Pytester) -> None:
    value = GOOD.get(flag, (None,))[0]
    result = pytester.runpytest_inprocess(flag, *([value] if value else []))
    refusal = _refusal(result)
    assert refusal.startswith(f"ERROR: {flag} ")
    assert "without --mistral-golden" in refusal


def test_ini_values_are_not_read_without_the_suite(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmistral_examples = many\nmistral_tokenizers = nope\nmistral_fail_on = maybe")
    pytester.makepyfile("def test_mine(): pass")
    result = pytester.runpytest_inprocess("-W", "error")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*Mistral conformance*")


def test_the_help_lists_every_option_and_ini_key(pytester: pytest.Pytester) -> None:
    text = pytester.runpytest_inprocess("--help").stdout.str()
    for option in OPTIONS:
        assert f"  {option.flag}" in text
        assert f"  {option.ini}" in text


def test_the_help_leaves_no_folder_behind(golden: Run, pytester: pytest.Pytester, monkeypatch: Any) -> None:
    import tempfile

    folder = pytester.mkdir("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert golden("--help").ret == 0
    assert golden("-k", "spm-v1::tokenizer::file").ret == 0
    assert list(folder.iterdir()) == []


def test_a_configuration_that_pytest_missed_is_named_in_the_summary(
    golden: Run, pytester: pytest.Pytester, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = pytester.makeini("[pytest]\nmistral_fail_on = note")
    other = shutil.copy(shipped_tokenizer("spm-v3"), tmp_path_factory.mktemp("elsewhere") / "tok.model.v3")
    missed = f"pytest has not read {file}: write --mistral-tokenizer=PATH, with an equals sign"
    chosen = ("-k", "tokenizer::file")
    assert missed in golden("--mistral-tokenizer", str(other), *chosen).outlines
    for arguments in ([f"--mistral-tokenizer={other}"], ["--mistral-tokenizer", str(other), "-c", str(file)]):
        assert missed not in golden(*arguments, *chosen).outlines
    shutil.copy(other, pytester.path / "tok.model.v3")
    assert missed not in golden("--mistral-tokenizer", "tok.model.v3", *chosen).outlines


def test_the_least_number_of_an_option_is_taken(settings_of: Read, pytester: pytest.Pytester) -> None:
    settings = settings_of("--mistral-examples", "1", "--mistral-seed", "0")
    assert (settings.options.examples, settings.options.seed) == (1, 0)
    pytester.makeini("[pytest]\nmistral_examples = 1")
    assert settings_of().options.examples == 1
