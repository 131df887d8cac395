"""Transcripts are asked again on request, and nothing that guards another model is written over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, load, load_folder
from pytest_mistral_lora.training.run import RunResult

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def golden(adapter: Path, tmp_path: Path) -> Path:
    """Two of its transcripts, in a folder of the user's."""
    (tmp_path / "golden").mkdir()
    for case in ("row-0001", "row-0002"):
        shutil.copy(adapter / TRANSCRIPTS / f"{case}.json", tmp_path / "golden")
    return tmp_path / "golden"


@pytest.fixture
def again(adapter: Path, base: Path, golden: Path) -> Callable[..., int]:
    def update(folder: Path = golden) -> int:
        return main(["smoke", str(adapter), "--base", str(base), "--record", str(folder), "--update"])

    return update


def test_the_same_adapter_leaves_every_file(
    again: Callable[..., int], golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in golden.iterdir()}
    assert again() == 0
    assert capsys.readouterr().out.splitlines() == [f"unchanged {golden}/row-000{n}.json" for n in (1, 2)]
    assert {file: file.read_bytes() for file in golden.iterdir()} == before


def test_another_adapter_writes_its_own_answers(
    again: Callable[..., int], adapter: Path, golden: Path, run: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_folder(golden)
    tensors = load_file(adapter / ADAPTER)
    save_file({name: tensor * 0.1 for name, tensor in tensors.items()}, adapter / ADAPTER)
    assert again(golden / "row-0001.json") == 0
    assert capsys.readouterr().out.splitlines() == [f"rewritten {golden}/row-0001.json"]
    first, second = load_folder(golden)
    assert first.model["tensors_sha256"] != run.manifest["lora"]["tensors_sha256"]
    assert first.text != before[0].text
    assert (first.row, first.max_new_tokens, first.case) == (before[0].row, 40, "row-0001")
    assert second == before[1]


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("model", {"base_weights_sha256": "0" * 64}, "tiny 000000000000"),
        ("tokenizer", {"file": "tekken.json", "sha256": "0" * 64}, "tekken.json 0000"),
    ],
)
def test_transcripts_of_another_model_are_refused_before_any_is_written(
    part: str,
    change: dict[str, str],
    said: str,
    again: Callable[..., int],
    golden: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = load(golden / "row-0002.json")
    replace(one, **{part: {**getattr(one, part), **change}}).write(golden)
    first = replace(load(golden / "row-0001.json"), text="Edited.")
    first.write(golden)
    assert again() == 2
    error = capsys.readouterr().err
    assert "row-0002" in error
    assert said in error
    assert load(golden / "row-0001.json") == first


def test_the_transcripts_of_a_finished_run_are_not_written_over(
    again: Callable[..., int], adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (adapter / TRANSCRIPTS, adapter / TRANSCRIPTS / "row-0001.json"):
        assert again(folder) == 2
        assert "the transcripts of a finished run" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--rows", "x"], ["--check", "eos"], []])
def test_it_asks_what_the_transcripts_ask_and_nothing_else(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    record = ["--record", "x"] if words else []
    assert main(["smoke", "out", *record, "--update", *words]) == 2
    assert "expected --record" in capsys.readouterr().err
