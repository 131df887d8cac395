"""The part that the packaged scripts share, on real datasets: numbers that follow their rows through any step."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pytest_mistral_lora.runners import HARNESS

datasets = pytest.importorskip("datasets", reason="the runners' own library")

Step = Callable[[Any], Any]
Run = Callable[[Step], list[dict[str, Any]]]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(HARNESS))
    for method in ("map", "filter", "save_to_disk"):  # put back at the end
        monkeypatch.setattr(datasets.Dataset, method, getattr(datasets.Dataset, method))
    import harness

    yield harness
    del sys.modules["harness"]


@pytest.fixture
def notes() -> list[str]:
    """What the script says of all rows."""
    return []


@pytest.fixture
def run(harness: ModuleType, notes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a script whose runner has one step of its own between the rows and their ids."""

    def run(step: Step, texts: tuple[str, ...] = ("a", "bb", "ccc", "dddd")) -> list[dict[str, Any]]:
        def encode(task: Any) -> list[Any]:
            data = datasets.Dataset.from_json(str(task.rows_file()), cache_dir=str(tmp_path / "cache"))
            made = step(data.map(lambda row: {"text": row["messages"][-1]["content"]}, remove_columns=["messages"]))
            made = made.map(lambda row: {"input_ids": [len(row["text"])], "labels": [len(row["text"])]})
            return [
                (row[harness.MARK], harness.labelled(row["input_ids"], row["labels"])) for row in harness.marked(made)
            ]

        rows = [{"messages": [{"role": "assistant", "content": text}]} for text in texts]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names = ("rows", "checkpoint", "config", "output")
        monkeypatch.setattr(
            "sys.argv", ["script", *(w for n in names for w in (f"--{n}", str(tmp_path / f"{n}.jsonl")))]
        )
        harness.main(encode, ("datasets", "not-there"))
        first, *rest = [json.loads(line) for line in (tmp_path / "output.jsonl").read_text().splitlines()]
        assert first["environment"]["datasets"] == datasets.__version__
        assert first["environment"]["not-there"] == "not installed"
        notes.extend(line["note"] for line in rest if "note" in line)
        return sorted((line for line in rest if "row" in line), key=lambda line: line["row"])

    return run


def _made(lines: list[dict[str, Any]]) -> dict[int, int | str]:
    return {line["row"]: line["error"] if "error" in line else line["input_ids"][0] for line in lines}


EVERY = {0: 1, 1: 2, 2: 3, 3: 4}
OUT = "it was left out, without an error"


def _double(batch: Any) -> Any:
    return {"text": [text for text in batch["text"] for _ in range(len(text))]}


def _short(batch: Any) -> Any:
    return {"text": [text for text in batch["text"] if len(text) < 3]}


def _joined(batch: Any) -> Any:
    return {"text": ["".join(batch["text"])]}


def _strict(row: Any) -> Any:
    if row["text"] == "bb":
        raise ValueError("bb is not allowed")
    return {"text": row["text"]}


def test_rows_that_are_kept_keep_their_numbers(run: Run) -> None:
    assert _made(run(lambda data: data)) == EVERY
    assert (
        _made(run(lambda data: data.map(lambda b: {"text": b["text"]}, batched=True, remove_columns="text"))) == EVERY
    )


def test_rows_in_another_order_keep_their_numbers(run: Run) -> None:
    assert _made(run(lambda data: data.shuffle(seed=1))) == EVERY


@pytest.mark.parametrize("processes", [None, 2])
def test_a_row_that_a_batch_loses_is_the_right_one(processes: int | None, run: Run) -> None:
    lines = run(lambda data: data.map(_short, batched=True, remove_columns=data.column_names, num_proc=processes))
    assert _made(lines) == {0: 1, 1: 2, 2: OUT, 3: OUT}


def test_one_worker_is_no_process_of_its_own(run: Run, tmp_path: Path) -> None:
    def step(data: Any) -> Any:
        made = data.map(lambda row: {"process": os.getpid()}, num_proc=1).filter(lambda row: True, num_proc=1)
        made.save_to_disk(str(tmp_path / "saved"), num_proc=1)
        assert set(made["process"]) == {os.getpid()}
        return datasets.load_from_disk(str(tmp_path / "saved"))

    assert _made(run(step)) == EVERY


def test_a_row_that_is_filtered_out_is_the_right_one(run: Run) -> None:
    assert _made(run(lambda data: data.filter(lambda row: row["text"] != "a"))) == {**EVERY, 0: OUT}


def test_a_row_that_becomes_several_is_an_error(run: Run) -> None:
    lines = run(lambda data: data.map(_double, batched=True, remove_columns=data.column_names))
    assert _made(lines) == {0: 1, **{n: f"{n + 1} sequences were made of it" for n in (1, 2, 3)}}


def test_a_step_that_carries_the_numbers_along_may_change_the_order(run: Run, harness: ModuleType) -> None:
    def unpaired(batch: Any) -> Any:
        texts = [*batch["text"], *(text.upper() for text in batch["text"])]
        return {"text": texts, harness.MARK: batch[harness.MARK] * 2}

    seen: list[tuple[int, str]] = []

    def step(data: Any) -> Any:
        made = data.map(unpaired, batched=True, remove_columns="text")
        seen.extend(zip(made[harness.MARK], made["text"], strict=True))
        return made.select(range(len(data)))

    assert _made(run(step)) == EVERY
    texts = ("a", "bb", "ccc", "dddd")
    assert seen == [*enumerate(texts), *enumerate(text.upper() for text in texts)]


def test_rows_that_are_packed_cannot_be_told_apart(run: Run) -> None:
    for step in (
        lambda data: data.map(_joined, batched=True, remove_columns=data.column_names),
        lambda data: data.select_columns(["text"]),
    ):
        with pytest.raises(SystemExit, match="turn packing off"):
            run(step)


def _refuse(data: Any) -> Any:
    raise ValueError("refused")


def test_a_row_that_fails_is_an_error_and_the_others_are_not(run: Run, notes: list[str]) -> None:
    assert _made(run(lambda data: data.map(_strict))) == {**EVERY, 1: "ValueError: bb is not allowed"}
    reason = "ValueError: bb is not allowed"
    [note] = notes
    assert f"all 4 rows is refused ({reason})" in note


def test_the_error_behind_an_error_is_named(run: Run) -> None:
    def refuse(row: Any) -> Any:
        try:
            return _strict(row)
        except ValueError as error:
            raise RuntimeError("while generating the dataset") from error

    reason = "RuntimeError: while generating the dataset; from ValueError: bb is not allowed"
    assert _made(run(lambda data: data.map(refuse)))[1] == reason


def test_a_runner_that_cannot_read_a_file_of_one_row_is_given_two(run: Run) -> None:
    assert _made(run(lambda data: data.map(_strict) if len(data) > 1 else _refuse(data))) == {
        **EVERY,
        1: "ValueError: bb is not allowed",
    }


def test_a_configuration_that_no_row_can_use_ends_the_script(run: Run) -> None:
    with pytest.raises(SystemExit, match="a plain row is refused, too: ValueError: refused"):
        run(_refuse)


@pytest.fixture
def own(harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Run a script whose runner loads data of its own, which the configuration names."""
    for name in ("load_dataset", "load_from_disk"):
        monkeypatch.setattr(datasets, name, getattr(datasets, name))

    def run(loaded: str, chat_rows: int = 3) -> list[dict[str, Any]]:
        rows = [{"input_ids": [number], "labels": [-number]} for number in range(3)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "disk")
        (tmp_path / "rows.jsonl").write_text('{"messages": []}\n' * chat_rows)

        def encode(task: Any) -> list[Any]:
            assert task.own_data
            assert task.rows == []
            if loaded == "disk":
                data = datasets.load_from_disk(str(tmp_path / "disk"))["train"]
            else:
                file = str(tmp_path / "train.jsonl")
                data = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
            data = harness.marked(data).select([2, 0])
            return [(row[harness.MARK], harness.labelled(row["input_ids"], row["labels"])) for row in data]

        words = [
            w for n in ("rows", "checkpoint", "config", "output") for w in (f"--{n}", str(tmp_path / f"{n}.jsonl"))
        ]
        monkeypatch.setattr("sys.argv", ["script", *words, "--own-data"])
        harness.main(encode, ())
        return [json.loads(line) for line in (tmp_path / "output.jsonl").read_text().splitlines()][1:]

    return run


@pytest.mark.parametrize("loaded", ["disk", "json"])
def test_a_runners_own_data_keep_their_numbers(own: Callable[..., list[dict[str, Any]]], loaded: str) -> None:
    assert own(loaded) == [
        {"row": 0, "input_ids": [0], "labels": [0]},
        {"row": 1, "error": OUT},
        {"row": 2, "input_ids": [2], "labels": [-2]},
    ]


def test_own_data_of_another_number_than_the_chat_rows_are_refused(own: Callable[..., list[dict[str, Any]]]) -> None:
    with pytest.raises(ValueError, match="own data have 3 rows, and the chat rows are 4"):
        own("disk", chat_rows=4)


@pytest.mark.parametrize(
    ("content", "other"),
    [
        ("Hello", "Hello."),
        (None, "."),
        ([{"type": "text", "text": "Hello"}], [{"type": "text", "text": "Hello"}, {"type": "text", "text": "."}]),
    ],
)
def test_a_rated_answer_that_is_passed_twice_has_two_texts(content: Any, other: Any, harness: ModuleType) -> None:
    """KTO of ms-swift drops a row whose answer is that of the other row of its batch."""
    row = {"prompt": [], "completion": [{"role": "assistant", "content": content}], "label": True}
    made = harness._with_other_answer(row)
    assert made == {**row, "completion": [{"role": "assistant", "content": other}]}
    assert harness._with_other_answer({"messages": []}) == {"messages": []}
