from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import write_outputs
from forked import run_forked
from page_sections import section

from pytest_mistral_lora.cli import main

PAGE = section("rows.md", "My trainer has prepared this")
COMMANDS = re.findall(r"^\$ (.*)$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_page_finds_the_masked_eos(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_outputs.write_checkpoint(tmp_path / "checkpoints" / "my-mistral")
    write_outputs.write_prepared(tmp_path / "last_run_prepared" / "0a1b2c3d")
    monkeypatch.chdir(tmp_path)
    program, *words = command.split()
    if program == "mistral-lora":
        code, output = main(words), capfd.readouterr().out
    else:
        # not the checks of the tokenizer, and no tiny train
        command_line = [sys.executable, "-m", program, "-p", "no:cacheprovider", *words, "-k", "encoded"]
        done = run_forked(command_line)
        code, output = done.returncode, done.stdout
    assert code == 1
    assert "ML546" in output


def test_the_page_has_commands_of_both_programs() -> None:
    assert {command.partition(" ")[0] for command in COMMANDS} == {"mistral-lora", "pytest"}
