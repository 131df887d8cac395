"""The page on goldens: its commands work, and its numbers are those of the judge."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from page_sections import section

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.records.judgement import TOLERANCES

Run = Callable[..., pytest.RunResult]
PAGE = section("suite.md", "Record your own goldens") + section("records.md", "Compare two runs")


def _commands() -> list[list[str]]:
    fences = re.findall(r"^```console\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    lines = [line for fence in fences for line in fence.splitlines() if line.startswith("$ ")]
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]


def test_the_commands_of_the_page_work(
    here: Path, golden: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    (here / "tests" / "goldens").mkdir(parents=True)
    (here / "lora").rename(here / "lora-out")
    shutil.copytree(here / "lora-out", here / "lora-new")
    recipe = (here / "recipe.yaml").read_text()
    (here / "recipe.yaml").write_text(recipe.replace('"lora"', '"lora-out"'))
    shown = []
    for program, *words in _commands():
        if program == "head":
            shutil.copy(here / "rows.jsonl", here / "tests" / "goldens" / "rows.jsonl")
        elif program == "mkdir":
            (here / words[-1]).mkdir(parents=True, exist_ok=True)
        elif program == "pytest":
            result = golden(*words[1:])
            shown += result.outlines
            assert result.parseoutcomes()["passed"] == 2
        else:
            assert main(words) == 0, capsys.readouterr().err
            shown += capsys.readouterr().out.splitlines()
    assert "golden created: tests/goldens/templates/recipe.yaml/rows-1.json" in shown
    assert "answers of recipe.yaml: 1 exact, 0 equivalent, 0 different" in shown
    assert "unchanged answers/row-0001.json" in shown
    assert "1 exact, 0 equivalent, 0 different; fp32 on cpu" in shown
    assert "facts: 0 differ" in shown


def test_the_tolerances_of_the_page_are_those_of_the_judge() -> None:
    said = re.search(
        r"a margin of ([\d.]+) nats and a mean move of ([\d.]+) nats a token in float32, "
        r"([\d.]+) and ([\d.]+) in float16, ([\d.]+) and ([\d.]+) in bfloat16",
        " ".join(PAGE.split()),
    )
    assert said is not None
    order = [TOLERANCES[name] for name in ("fp32", "fp16", "bf16")]
    assert [float(one) for one in said.groups()] == [value for one in order for value in (one.margin, one.logprob)]
