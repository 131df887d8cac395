"""The tour of a newcomer, offline and on a CPU: each command names the next one."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
import write_outputs

from pytest_mistral_lora.cli import main

TEMPLATE = Path("models/demo/chat_template.jinja")
SOUND, BROKEN = "{{- '[INST] ' }}", "{{- '[INST]' }}"


class Tour:
    """Runs printed commands in a folder."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.shown = ""

    def run(self, command: str, *, code: int = 0) -> str:
        """Run one or several commands, and return the command that the last of them names as the next."""
        for words in command.split(" && "):
            program, *arguments = shlex.split(words)
            assert program == "mistral-lora"
            found = main(arguments)
            output = self._capsys.readouterr()
            self.shown = output.out + output.err
            assert found == code, self.shown
        following = re.search(r"^next: (.+)$", self.shown, flags=re.MULTILINE)
        return following[1] if following else ""


@pytest.fixture
def tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tour:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    return Tour(capsys)


def test_each_printed_command_leads_on_from_an_empty_folder_to_a_proven_adapter(
    tour: Tour, capsys: pytest.CaptureFixture[str]
) -> None:
    check = tour.run("mistral-lora init --demo")
    assert check == "mistral-lora check recipe.yaml"
    TEMPLATE.write_text(TEMPLATE.read_text().replace(SOUND, BROKEN))
    mend = tour.run(check, code=1)
    [output] = [output for output in write_outputs.OUTPUTS if output.name == "tour"]
    assert output.shows(write_outputs.end_of_check(tour.shown)), "Run: python scripts/write_outputs.py"
    assert mend == f"mistral-lora template --tokenizer models/demo --output {TEMPLATE}"
    tour.run(mend)
    assert SOUND in TEMPLATE.read_text()
    train = tour.run(check)
    assert train == "mistral-lora train recipe.yaml"
    tour.run(train)
    assert "loss" in tour.shown
    prove = tour.run(check)
    assert prove == "mistral-lora verify lora-out && mistral-lora smoke lora-out"
    tour.run(prove)
    assert "0 equivalent, 0 different" in tour.shown
    card = Path("lora-out/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of PEFT, about transformers
        exec(compile(card.replace("Hello", "What is the capital of France?"), "README.md", "exec"), {})
    assert capsys.readouterr().out == "The capital of France is Paris.\n"


@pytest.mark.parametrize("words", [["rows.jsonl"], ["--base", "models/base"], ["--dry-run"]])
def test_the_demo_takes_no_other_inputs(words: list[str], tour: Tour) -> None:
    tour.run(shlex.join(["mistral-lora", "init", "--demo", *words]), code=2)
    assert not Path("models").exists()


def test_a_second_demo_changes_nothing(tour: Tour) -> None:
    tour.run("mistral-lora init --demo")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    tour.run("mistral-lora init --demo")
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert "created" not in tour.shown
