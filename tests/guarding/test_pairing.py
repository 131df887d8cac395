"""The rows of a batch and the rows of the dataset: by their ids, whatever a collator or a user did to their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from guarded_runs import begin, chat_rows, encoded, errors_of, make_trainer
from sampling import sampled

from pytest_mistral_lora import guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.guarding.pairing import SourceRow, paired

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]


@pytest.fixture
def rows(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(8), messages=True)


def _read_back(verdict: Any) -> str:
    return str(verdict.facts["batches::encoded::ids"]["encoded rows of"])


class Changed:
    """A collator that changes the rows before they are padded."""

    def __init__(self, change: Any, pads: Any) -> None:
        self.change, self.pads = change, pads

    def __call__(self, items: Rows) -> Any:
        return self.pads(self.change([dict(item) for item in items]))


def _longest_first(items: Rows) -> Rows:
    return sorted(items, key=lambda item: -len(item["input_ids"]))


def _guarded(base: Path, rows: Any, work: Path, change: Any, **settings: Any) -> Any:
    settings = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"} | settings
    trainer = make_trainer(base, rows, work, **settings)
    trainer.data_collator = Changed(change, trainer.data_collator)
    return trainer


def test_a_collator_that_sorts_its_batch_is_sound(base: Path, rows: Rows, tmp_path: Path) -> None:
    verdict = begin(_guarded(base, rows, tmp_path, _longest_first)).verdict
    assert errors_of(verdict) == set()
    # by their messages
    assert "without messages" not in _read_back(verdict)


@pytest.mark.parametrize("dtype", sampled([torch.bool, torch.float32], {"torch.bool"}))
def test_a_mask_of_another_type_is_sound(dtype: torch.dtype, base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, per_device_train_batch_size=4)
    pads = trainer.data_collator

    def converted(items: Rows) -> dict[str, torch.Tensor]:
        batch = pads(items)
        return {**batch, "attention_mask": batch["attention_mask"].to(dtype)}

    trainer.data_collator = converted
    assert errors_of(begin(trainer).verdict) == set()
    trainer = make_trainer(base, [{**row, "labels": row["input_ids"]} for row in rows], tmp_path)
    trainer.data_collator = converted
    assert {rule for rule, _ in errors_of(begin(trainer, on_finding="warn").verdict)} == {"ML543"}


def test_a_fault_in_a_sorted_batch_names_its_row_of_the_dataset(base: Path, rows: Rows, tmp_path: Path) -> None:
    rows[6]["labels"][-1] = -100
    verdict = begin(_guarded(base, rows, tmp_path, _longest_first), on_finding="warn").verdict
    assert errors_of(verdict) == {("ML546", "train_dataset[6]")}


def test_a_fault_of_a_collator_that_sorts_names_its_row_of_the_dataset(base: Path, rows: Rows, tmp_path: Path) -> None:
    def damage(items: Rows) -> Rows:
        for item in items:
            if item["input_ids"] == rows[5]["input_ids"]:
                item["input_ids"], item["labels"] = [*item["input_ids"], 1010], [*item["labels"], 1010]
        return _longest_first(items)

    verdict = begin(_guarded(base, rows, tmp_path, damage), on_finding="warn").verdict
    assert {place for _, place in errors_of(verdict)} == {"train_dataset[5]"}


@pytest.mark.parametrize("cut", [slice(0, 15), slice(-15, None)], ids=["end", "start"])
def test_a_row_that_the_collator_cuts_has_its_messages(cut: slice, base: Path, rows: Rows, tmp_path: Path) -> None:
    def shorter(items: Rows) -> Rows:
        return [{key: item[key][cut] for key in ("input_ids", "labels")} for item in _longest_first(items)]

    verdict = begin(_guarded(base, rows, tmp_path, shorter), on_finding="warn").verdict
    assert "without messages" not in _read_back(verdict)
    assert {rule for rule, _ in errors_of(verdict)} - {"ML506"} == {"ML531"}
    assert {place for rule, place in errors_of(verdict) if rule == "ML531"} == {f"train_dataset[{n}]" for n in range(8)}


@pytest.mark.parametrize("change", ["filter", "exchange"])
def test_a_dataset_that_changes_after_the_guard_is_sound(
    change: str, base: Path, rows: Rows, oracle: Oracle, tmp_path: Path
) -> None:
    trainer = _guarded(base, rows, tmp_path, list, max_steps=1)
    callback = guard(trainer)
    dataset: Any = trainer.train_dataset
    trainer.train_dataset = {
        "filter": lambda: dataset.filter(lambda row, n: n % 2 == 1, with_indices=True),
        "exchange": lambda: Dataset.from_list(encoded(oracle, chat_rows(12)[4:], messages=True)),
    }[change]()
    trainer.train()
    assert errors_of(callback.verdict) == set()
    assert "without messages" not in _read_back(callback.verdict)


def test_messages_of_other_rows_are_not_taken(base: Path, rows: Rows, oracle: Oracle, tmp_path: Path) -> None:
    trainer = _guarded(base, rows, tmp_path, list)
    loader = trainer.get_train_dataloader()
    trainer.get_train_dataloader = lambda: loader
    trainer.train_dataset = Dataset.from_list(rows[::-1])
    verdict = begin(trainer).verdict
    assert errors_of(verdict) == set()
    assert "8 without messages" in _read_back(verdict)


def test_messages_in_the_format_of_another_program_are_not_taken(base: Path, rows: Rows, tmp_path: Path) -> None:
    for row in rows:
        row["messages"] = [{"from": each["role"], "value": each["content"]} for each in row["messages"]]
    rows[2]["labels"][-1] = -100
    verdict = begin(_guarded(base, rows, tmp_path, list), on_finding="warn").verdict
    assert errors_of(verdict) == {("ML546", "train_dataset[2]")}
    assert "8 without messages" in _read_back(verdict)


class OwnRows(torch.utils.data.Dataset[Any]):
    """Rows of a class of the user's, which has no columns."""

    __slots__ = ("rows",)

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return row | {key: torch.tensor(row[key]) for key in ("input_ids", "labels")}


def test_the_rows_of_a_users_class_have_their_messages(base: Path, rows: Rows, tmp_path: Path) -> None:
    rows[2]["messages"] = [{"role": "system", "content": "Be brief."}, *rows[2]["messages"]]
    verdict = begin(_guarded(base, OwnRows(rows), tmp_path, _longest_first), on_finding="warn").verdict
    assert errors_of(verdict) == {("ML525", "train_dataset[2]")}


def _sources(*rows: list[int]) -> list[SourceRow]:
    return [SourceRow(10 + n, (tuple(row),), {"messages": f"of {n}"}) for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([[1, 5, 6, 2], [1, 7, 2, 0]], [(10, "of 0"), (11, "of 1")]),
        ([[1, 7, 2, 0], [1, 5, 6, 2]], [(11, "of 1"), (10, "of 0")]),
        ([[0, 1, 7, 2], [1, 5, 6, 2]], [(11, "of 1"), (10, "of 0")]),
        # cut, and one that several rows begin with
        ([[1, 5, 6], [1, 7, 2, 0]], [(10, "of 0"), (11, "of 1")]),
        # no row of the dataset, and the order is known
        ([[1, 5, 6, 2], [8, 9, 8, 9]], [(10, "of 0"), (11, None)]),
        # no row of the dataset, and the order is not known
        ([[1, 7, 2, 0], [8, 9, 8, 9]], [(11, "of 1"), (None, None)]),
    ],
)
def test_the_row_that_ids_belong_to(ids: list[list[int]], expected: list[tuple[int | None, str | None]]) -> None:
    records = [{"input_ids": row, "labels": row} for row in ids]
    found = paired(records, _sources([1, 5, 6, 2], [1, 7, 2]))
    assert [(row.index, row.record.get("messages")) for row in found] == expected


def test_equal_rows_keep_their_order() -> None:
    records = [{"input_ids": [1, 5, 2]}] * 2
    assert [row.index for row in paired(records, _sources([1, 5, 2], [1, 5, 2]))] == [10, 11]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_rows_end_to_end_have_their_conversations_in_any_order(order: tuple[int, ...]) -> None:
    # the third begins as the first does
    rows = [[1, 5, 2], [1, 6, 7, 2], [1, 5, 2, 2]]
    flat = [token for n in order for token in rows[n]]
    [row] = paired([{"input_ids": [*flat, 0, 0], "labels": []}], _sources(*rows))
    assert (row.index, row.count) == (None, 3)
    assert [each["messages"] for each in row.record["conversations"]] == [f"of {n}" for n in order]
    [other] = paired([{"input_ids": [*flat[1:], 0], "labels": []}], _sources(*rows))
    assert "conversations" not in other.record


class Token(int):
    """An id that counts how often it is compared."""

    compared: ClassVar[int] = 0

    def __eq__(self, other: object) -> bool:
        Token.compared += 1
        return int(self) == other

    __hash__ = int.__hash__


def test_the_work_for_a_batch_in_order_grows_with_its_rows() -> None:
    compared = []
    for count in (20, 40):
        sources = [SourceRow(n, ((1, 3, *range(100 + n, 120 + n), 2),), {}) for n in range(count)]
        records = [{"input_ids": [Token(token) for token in row.sides[0]]} for row in sources]
        Token.compared = 0
        assert [row.index for row in paired(records, sources)] == list(range(count))
        compared.append(Token.compared)
    assert 0 < compared[1] < 3 * compared[0]
