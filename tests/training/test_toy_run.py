"""A tiny run on rows of a kind, and with a type of chunk, that tests bring along, and the checks of its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_runs import recipe_data
from toys import Data, asides, poems, toys_known, write_lines

from pytest_mistral_lora.cli import main


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with toys_known():
        yield


@pytest.mark.parametrize(
    ("records", "policy"),
    [(poems, "assistant turns of weight 1 and completions, to EOS"), (asides, "assistant turns of weight 1, to EOS")],
)
def test_its_rows_are_trained_on_and_verified(
    records: Callable[[], list[Data]], policy: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", records())
    recipe = tmp_path / "recipe.yaml"
    evaluation = {"generations": 2, "max_new_tokens": 5}
    data = recipe_data(base, training={"steps": 1}, evaluation=evaluation)
    recipe.write_text(json.dumps(data), encoding="utf-8")
    assert main(["check", str(recipe), "--examples", "1"]) == 0
    assert main(["train", str(recipe)]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["masking"]["policy"] == policy
    assert manifest["dataset"]["rows_used"] == len(records())
    capsys.readouterr()
    words = ("verify", str(tmp_path / "out"), "--dataset", str(rows))
    assert main([*words]) == 0
    assert "0 mismatch" in capsys.readouterr().out
    assert main(["smoke", str(tmp_path / "out"), "--base", str(base)]) == 0
    assert "2 exact" in capsys.readouterr().out
    write_lines(rows, records()[1:])
    assert main([*words]) == 1
    assert "dataset.rows_sha256" in capsys.readouterr().out
