"""How a configuration of ms-swift becomes words of its command line, and rows that it cannot encode are left out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_mistral_lora.runners import RUNNERS, runner_fixes

pytest.importorskip("datasets", reason="the runners' own library")

STOCK = RUNNERS["ms-swift"].config
ROWS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(RUNNERS["ms-swift"].script.parent))
    import ms_swift_rows

    yield ms_swift_rows
    for name in ("ms_swift_rows", "harness"):
        sys.modules.pop(name, None)


def words(script: ModuleType, config: Path, folder: Path, *, own_data: bool = False) -> dict[str, list[str]]:
    folder.mkdir()
    task = script.Task([{**row, script.MARK: n} for n, row in enumerate(ROWS)], Path("base"), config, folder, own_data)
    found: dict[str, list[str]] = {}
    for word in script.words(task):
        if word.startswith("--"):
            key = word
            found[key] = []
        else:
            found[key].append(word)
    return found


def test_the_rows_and_the_model_are_ours_and_the_template_is_the_configuration_s(
    script: ModuleType, tmp_path: Path
) -> None:
    made = words(script, STOCK, tmp_path / "work")
    assert (made["--model"], made["--model_type"]) == (["base"], ["mistral"])
    lines = Path(made["--dataset"][0]).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{**ROWS[0], script.MARK: 0}]


def test_lists_are_words_and_what_names_other_data_is_dropped(script: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_text("model_type: mistral\nval_dataset: other.jsonl\ndataset: [a.jsonl, b.jsonl]\ndeepspeed: zero3\n")
    made = words(script, config, tmp_path / "work", own_data=True)
    assert made["--dataset"] == ["a.jsonl", "b.jsonl"]
    assert made.keys().isdisjoint({"--val_dataset", "--deepspeed"})
    assert made["--split_dataset_ratio"] == ["0"]


def test_a_row_that_cannot_be_encoded_is_left_out_and_no_other_takes_its_place(script: ModuleType) -> None:
    """ms-swift's own dataset would return a random other row."""
    datasets = pytest.importorskip("datasets")

    def encode(row: dict[str, Any], return_length: bool) -> dict[str, Any]:
        assert script.MARK not in row
        if row["text"] == "bad":
            raise ValueError("no tool format")
        return {"input_ids": [1, 2], "labels": [-100, 2]}

    rows = datasets.Dataset.from_list([{"text": "good", script.MARK: 0}, {"text": "bad", script.MARK: 1}])
    collate = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[-100, 2]])}
    trainer = SimpleNamespace(
        train_dataset=SimpleNamespace(dataset=rows, encode_func=encode), data_collator=lambda batch: collate
    )
    assert list(script._made(trainer)) == [(0, {"input_ids": [1, 2], "labels": [-100, 2]})]


def test_rows_with_tools_have_a_key_for_their_form() -> None:
    assert "`agent_template: mistral`" in runner_fixes("ms-swift")["ML502"]
