"""Files of sound rows that look like faults: `check` finds nothing in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dataset_recipes import found, write_rows
from derived_tekken import derived_tokenizer
from sound_rows import SOUND_ROWS, SoundRows

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.dataset.checks import file_results
from pytest_mistral_lora.report.lines import LOOK_AT


@pytest.mark.parametrize("rows", SOUND_ROWS, ids=lambda rows: rows.title)
def test_sound_rows_have_no_finding(rows: SoundRows, tmp_path: Path) -> None:
    tokenizer = CheckpointTokenizer(shipped_tokenizer("spm-v3"))
    for file in rows.files:
        path = write_rows(tmp_path / "rows.jsonl", file)
        assert [(finding.rule, finding.found) for finding in found(file_results(path, tokenizer))] == [], file[0]


def test_tags_that_a_prompt_asks_for_are_no_thought_of_a_tokenizer_that_thinks(tmp_path: Path) -> None:
    tokenizer = CheckpointTokenizer(derived_tokenizer("derived-v13-thinking"))
    files = [file for rows in SOUND_ROWS for file in rows.files if "think>" in json.dumps(file[0])]
    for file in files:
        path = write_rows(tmp_path / "rows.jsonl", file)
        assert found(file_results(path, tokenizer)) == []
    [file] = [file for file in files if "Think in <think> tags" in json.dumps(file[0])]
    # without the request, the oracle shows that they are letters beside tokens for thinking
    for row in file:
        del row["messages"][0]
    path = write_rows(tmp_path / "rows.jsonl", file)
    assert {finding.rule for finding in found(file_results(path, tokenizer))} == {"ML630"}


def test_check_is_silent(tmp_path: Path, capsys: Any) -> None:
    files = [file for rows in SOUND_ROWS for file in rows.files[:1]]
    paths = [write_rows(tmp_path / f"{number}.jsonl", file) for number, file in enumerate(files)]
    assert main(["check", *map(str, paths), "--tokenizer", "spm-v3"]) == 0
    out = capsys.readouterr().out
    assert LOOK_AT not in out
    assert "\n0 findings;" in out
