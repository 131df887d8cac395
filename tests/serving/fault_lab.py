"""What the labs of planted faults share: an adapter that knows its rows by heart, and the check of a server by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from planted_faults import LEARNED

from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.train.harness import TrainerHarness
from pytest_mistral_lora.records.transcripts import load_folder
from pytest_mistral_lora.training.generate.model_spec import record_rows
from pytest_mistral_lora.training.run import train

Check = Callable[..., tuple[int, str]]
"""Runs `serve-check`, and returns its exit code and what it prints."""


def learn(harness: TrainerHarness, folder: Path) -> None:
    """Train `folder/adapter` on a base until it knows the rows by heart, and record `folder/answers`."""
    harness.rows.write_text("".join(json.dumps(row) + "\n" for row in LEARNED), encoding="utf-8")
    train(harness.recipe(folder / "adapter", steps=50, batch_size=len(LEARNED)))
    rows = list(read_rows(harness.rows))
    record_rows(folder / "adapter", rows, folder / "answers", harness.base, max_new_tokens=48, device="cpu")
    assert [golden.stop for golden in load_folder(folder / "answers")] == ["eos"] * len(LEARNED)


def check_of(folder: Path, tokenizer: Path, of_kind: str, capsys: pytest.CaptureFixture[str]) -> Check:
    """Return the check of a server by the rows and the answers of a lab's folder."""

    def run(address: str, *words: str, kind: str = of_kind, rows: bool = True, golden: bool = True) -> tuple[int, str]:
        given = ["--tokenizer", str(tokenizer)]
        given += ["--golden", str(folder / "answers")] if golden else []
        given += ["--rows", str(folder / "rows.jsonl")] if rows else []
        capsys.readouterr()
        code = main(["serve-check", f"{kind}={address}", *given, *words])
        return code, "".join(capsys.readouterr())

    return run
