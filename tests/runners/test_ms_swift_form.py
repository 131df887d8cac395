"""How a configuration of ms-swift becomes words of its command line, and rows that it cannot encode are left out."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_mistral_lora.runners import TRAINERS

pytest.importorskip("datasets", reason="the runners' own library")

STOCK = TRAINERS["ms-swift"].config
ROWS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]


@pytest.fixture
def script(scripts: None) -> ModuleType:
    import ms_swift_rows

    return ms_swift_rows


def words(
    script: ModuleType,
    config: Path,
    folder: Path,
    *,
    rows: list[dict[str, Any]] = ROWS,
    own_data: bool = False,
    name: str = "",
) -> dict[str, list[str]]:
    folder.mkdir()
    marked = [{**row, script.MARK: n} for n, row in enumerate(rows)]
    task = script.Task(marked, Path("base"), config, folder, own_data, name)
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
    assert list(script._made(trainer, "")) == [(0, {"input_ids": [1, 2], "labels": [-100, 2]})]


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
PROMPT, GOOD, BAD = ROWS[0]["messages"][:1], ROWS[0]["messages"][1:], [{"role": "assistant", "content": "No"}]


def test_a_pair_is_two_conversations(script: ModuleType, tmp_path: Path) -> None:
    pair = {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD, "tools": [TOOL]}
    made = words(script, STOCK, tmp_path / "work", rows=[pair], name="cpo")
    assert (made["--rlhf_type"], made["--padding_free"]) == (["cpo"], ["False"])
    [row] = map(json.loads, Path(made["--dataset"][0]).read_text().splitlines())
    assert row == {
        "messages": [*PROMPT, *GOOD],
        "rejected_messages": [*PROMPT, *BAD],
        "tools": [TOOL],
        "rejected_tools": [TOOL],
        script.MARK: 0,
    }


def test_a_rated_answer_is_a_conversation_with_a_label(script: ModuleType, tmp_path: Path) -> None:
    rated = {"prompt": PROMPT, "completion": BAD, "label": False}
    made = words(script, TRAINERS["ms-swift"].default_config("kto"), tmp_path / "work", rows=[rated], name="kto")
    assert made["--gradient_accumulation_steps"] == ["8"]
    [row] = map(json.loads, Path(made["--dataset"][0]).read_text().splitlines())
    assert row == {"messages": [*PROMPT, *BAD], "label": False, script.MARK: 0}


def test_another_reference_model_is_left_out(script: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_text("model_type: mistral\nrlhf_type: dpo\nref_model: other\nref_adapters: [one]\n")
    made = words(script, config, tmp_path / "work", own_data=True, name="dpo")
    assert made.keys().isdisjoint({"--ref_model", "--ref_adapters"})


def test_the_sides_of_a_batch_are_without_padding(script: ModuleType) -> None:
    batch = {
        "input_ids": torch.tensor([[0, 1, 2], [1, 3, 4]]),
        "labels": torch.tensor([[-100, -100, 2], [-100, 3, 4]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    }
    assert script._columns(batch, "dpo") == {
        "chosen_input_ids": [1, 2],
        "chosen_labels": [-100, 2],
        "rejected_input_ids": [1, 3, 4],
        "rejected_labels": [-100, 3, 4],
    }
    del batch["labels"]
    assert script._columns(batch, "rm") == {"chosen_input_ids": [1, 2], "rejected_input_ids": [1, 3, 4]}


def test_a_rated_answer_is_without_the_answer_of_another_row(script: ModuleType) -> None:
    ids, shown = torch.tensor([[1, 2]]), torch.tensor([[1, 1]])
    batch = {"completion_input_ids": ids, "completion_labels": ids, "completion_attention_mask": shown, "label": [True]}
    batch |= {"KL_completion_input_ids": torch.tensor([[5]]), "KL_completion_attention_mask": torch.tensor([[1]])}
    assert script._columns(batch, "kto") == {
        "completion_input_ids": [1, 2],
        "completion_labels": [1, 2],
        "label": True,
    }


def test_rows_with_tools_have_a_key_for_their_form() -> None:
    assert "`agent_template: mistral`" in TRAINERS["ms-swift"].fixes()["ML502"]
