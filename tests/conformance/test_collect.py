from __future__ import annotations

import gc
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.collection import NamedPaths, collect
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import Terminated


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(2, None, "cpu", True, (), False, tmp_path)


def test_a_tokenizer_that_two_targets_have_is_judged_once(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(shipped_tokenizer("spm-v3"), folder / "tokenizer.model.v3")
    copied = shutil.copytree(folder, tmp_path / "copy")
    named = NamedPaths(tokenizers=[folder, copied / ".." / "base", copied]).targets()
    checks = {check.name: check for check in collect(named, settings)}
    for case in ("tokenizer::file", "tokenizer::bos-eos-unk", "mask::bos-once"):
        results = [checks[f"{name}::{case}"].run() for name in ("base", "base-2", "copy")]
        assert results[1] is results[0], case
        assert results[2] is not results[0], case


def test_two_declarations_of_one_folder_are_judged_apart(tmp_path: Path, settings: Settings) -> None:
    converted_tokenizer("spm-v3").fast.save_pretrained(tmp_path / "base")
    named = [Target(f"as-{oracle}", tmp_path / "base", oracle_name=oracle) for oracle in (None, "none", "spm-v2")]
    results = [check.run() for check in collect(named, settings) if check.case == "oracle"]
    assert [[one.rule for one in result.findings] for result in results] == [[], [], ["ML230"]]
    assert [bool(result.not_checked) for result in results] == [False, True, False]


def test_one_check_reports_a_tokenizer_that_does_not_load_for_all_checks_and_workers(
    tmp_path: Path, settings: Settings
) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        (folder / "tokenizer.model.v3").write_bytes(b"no tokenizer")
    # the second list stands for another worker of the session, which meets the errors later
    for reports in (True, False):
        named = NamedPaths(tokenizers=[folders[0], folders[1], folders[0]]).targets()
        checks: list[Check] = [one for one in collect(named, settings) if one.case in ("bos-eos-unk", "vocabulary")]
        results = {check.name: check.run() for check in reversed(checks) if reports or check.case == "bos-eos-unk"}
        rules = {name: [finding.rule for finding in result.findings] for name, result in results.items()}
        reporters = {"one-2::tokenizer::vocabulary": ["ML201"], "two::tokenizer::vocabulary": ["ML201"]}
        assert {name: found for name, found in rules.items() if found} == (reporters if reports else {})
        assert results["one::tokenizer::bos-eos-unk"].not_checked == "one-2::tokenizer::vocabulary failed (ML201)"
        assert results["two::tokenizer::bos-eos-unk"].not_checked == "two::tokenizer::vocabulary failed (ML201)"


@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated, ValueError])
def test_an_interruption_of_a_check_within_the_garbage_collector_is_raised(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: reported.append(one.exc_type))

    def callback(phase: str, info: Any) -> None:
        if phase == "stop":
            raise error

    check = Check(Target("spm-v3"), "mask", "any", Result)
    gc.callbacks.append(callback)
    try:
        with nullcontext() if error is ValueError else pytest.raises(error):
            # without the collection that it makes at its end, one would come with the next objects
            check.run()
    finally:
        gc.callbacks.remove(callback)
    assert reported == [ValueError] * (error is ValueError)
