"""What an error says beside its fault: the name that is meant, the line, and the value to set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora import assertions
from pytest_mistral_lora.cli import main

RECIPE = """\
base:
  path: models/dmo
  weights_sha256: {hash}
data:
  train: [rows.jsonl]
training: {{steps: 1}}
output: out
"""


@pytest.mark.parametrize(
    ("text", "line", "step"),
    [
        ("base:\n  path: a\n   weights: 1\n", ":3: ", "'   weights: 1'"),
        ("base:\n\tpath: a\n", ":2: ", "Indent with spaces"),
        ("a:\n  - b\n c: 1\n", ":3: ", "Indent the line"),
    ],
)
def test_yaml_that_cannot_be_read_is_quoted(text: str, line: str, step: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["check", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert (f"recipe.yaml{line}" in error, step in error) == (True, True)


def test_the_folder_beside_a_missing_base_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "demo").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(hash="f" * 64))
    (tmp_path / "rows.jsonl").write_text("")
    main(["check", "recipe.yaml", "--no-cache"])
    lines = capsys.readouterr().out.splitlines()
    [found] = [line for line in lines if line.startswith("ML208 ")]
    assert "(did you mean 'models/demo'?)" in found
    [fix] = [line for line in lines[lines.index(found) :] if line.startswith("  fix:")]
    assert "base.path" in fix


def test_a_word_of_the_documents_that_is_no_verb_is_explained(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["gate", "lora-out"])
    assert "evaluation.gate" in capsys.readouterr().err


def test_the_module_of_assertions_lists_assertions() -> None:
    assert dir(assertions) == sorted(assertions.__all__)
