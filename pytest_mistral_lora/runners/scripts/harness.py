"""The shared part of the extraction scripts; without imports of this project, which the runner's environment lacks.

A script is a command that maps rows to encoded rows:

    SCRIPT --rows ROWS.jsonl --checkpoint FOLDER --config FILE --output OUT.jsonl [--own-data] [--task NAME]

With `--own-data` the runner gets the unchanged rows that its configuration names, and `ROWS.jsonl` has the chat rows
behind them, in order. With `--task`, the rows are preference pairs or rated answers with `prompt`, and the
runner's command of that name takes them.

`OUT.jsonl` gets a line for the environment, `{"environment": {"NAME": "1.16.0", ...}}`, and then one line for each
row, in any order: `{"row": 0, "input_ids": [...], "labels": [...]}`, or `{"row": 0, "error": "..."}`. Of a preference
pair, the columns are `chosen_input_ids`, `chosen_labels` and the same of `rejected`; of a rated answer `completion_...`
and its `label`. The ids hold the prompt, and labels are left out if tokens have no loss of their own. A line
`{"note": "..."}` is for the reader. The script of an evaluation gets no rows, and writes its prompts: see
`runners.prompts`. A configuration that the runner cannot use ends in an exit code other than 0, with
the reason as the last line of stderr.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MARK = "mistral_lora_row"
"""The column that carries a row's number through the runner's own steps."""

_AGAIN = -1
"""The number of a row that is passed a second time."""

PLAIN = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
"""A row that every sound configuration accepts."""


class PackedError(Exception):
    """The runner joins rows into sequences, which its result for a single row does not show."""

    def __init__(self) -> None:
        super().__init__("rows are packed, and cannot be told apart; turn packing off in the configuration")


class CapturedError(Exception):
    """Ends the runner's command as soon as its rows are ready; it is not a failure."""


@dataclass(frozen=True)
class Task:
    """One call of the runner.

    Attributes:
        rows: Chat rows, each with its number under `MARK`.
        checkpoint: Folder with the tokenizer and a tiny model.
        config: The runner's own configuration.
        folder: An empty folder for the files of this call.
        own_data: Whether to keep the data that the configuration names.
        name: The runner's command, such as `dpo`; empty for the one that trains on chat rows.
    """

    rows: list[dict[str, Any]]
    checkpoint: Path
    config: Path
    folder: Path
    own_data: bool = False
    name: str = ""

    def rows_file(self, rows: list[dict[str, Any]] | None = None) -> Path:
        """Write rows as a JSONL file, and return the file."""
        file = self.folder / "data" / "train.jsonl"
        file.parent.mkdir()
        lines = [json.dumps(row) + "\n" for row in (self.rows if rows is None else rows)]
        file.write_text("".join(lines), encoding="ascii")
        return file


Encoded = tuple[int, dict[str, Any]]
"""The number of a row, and its columns: `input_ids` and `labels`, or those of a preference record."""
Encode = Callable[[Task], list[Encoded]]


def main(encode: Encode, packages: tuple[str, ...], notes: dict[str, str] | None = None) -> None:
    """Run a script.

    Args:
        encode: Runs the runner's own code on a task, and returns number, ids and labels of each resulting row.
        packages: Distributions whose versions are recorded.
        notes: Further facts about the environment.
    """
    given = arguments()
    # not `splitlines`, which also splits at a line separator within a row
    lines = given.rows.read_text(encoding="utf-8").split("\n")
    rows = [{**json.loads(line), MARK: number} for number, line in enumerate(filter(None, lines))]
    _keep_marks()
    with given.output.open("w", encoding="utf-8") as output:
        output.write(json.dumps({"environment": {**versions(packages), **(notes or {})}}) + "\n")
        bisection = _Bisection(encode, given.checkpoint, given.config, given.task)
        for record in bisection.own_records(rows) if given.own_data else bisection.records(rows):
            output.write(json.dumps(record, ensure_ascii=False) + "\n")


def arguments() -> argparse.Namespace:
    """Return the options of a script, and leave none for the runner, which would refuse them."""
    parser = argparse.ArgumentParser()
    for name in ("rows", "checkpoint", "config", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--own-data", action="store_true")
    parser.add_argument("--task", default="")
    given = parser.parse_args()
    sys.argv = sys.argv[:1]
    return given


def marked(dataset: Any) -> Any:
    """Return a dataset of the runner whose rows still have their numbers.

    Raises:
        PackedError: If they have lost them.
    """
    if MARK not in dataset.column_names:
        raise PackedError
    return dataset


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of some distributions, and of Python."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class _Bisection:
    """Passes all rows to the runner in one file; if it refuses them, in ever smaller files, to find the bad rows."""

    encode: Encode
    checkpoint: Path
    config: Path
    name: str = ""

    def records(self, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        try:
            made = self._run(rows)
        except PackedError as error:
            sys.exit(str(error))
        except Exception as error:
            reason = _reason(error)
            # the reason has only the error; its origin in the runner's code is for the log
            traceback.print_exc()
        else:
            yield from self._made(rows, made)
            return
        # otherwise, a configuration that refuses everything would look like a file of bad rows
        try:
            self._run([{**_plain(rows[0]), MARK: 0}])
        except Exception as error:
            sys.exit(f"a plain row is refused, too: {_reason(error)}")
        yield {"note": f"the file of all {len(rows)} rows is refused ({reason}); they were given in smaller ones"}
        yield from self._parts(rows, reason)

    def own_records(self, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the runner's records for the data of its configuration; no row can be left out of it."""
        import datasets

        # the numbers are added as the data are loaded
        for name in ("load_dataset", "load_from_disk"):
            setattr(datasets, name, _numbering(getattr(datasets, name), len(rows)))
        with tempfile.TemporaryDirectory() as folder:
            task = Task([], self.checkpoint, self.config, Path(folder), own_data=True, name=self.name)
            made = self.encode(task)
        yield from self._made(rows, made)

    def _parts(self, rows: list[dict[str, Any]], reason: str) -> Iterator[dict[str, Any]]:
        """Yield the records of rows that are refused together."""
        if len(rows) == 1:
            yield {"row": rows[0][MARK], "error": reason}
            return
        # a column of a file has one type: rows whose contents are lists are refused beside plain texts
        texts = [row for row in rows if all(not isinstance(message.get("content"), list) for message in _messages(row))]
        lists = [row for row in rows if row not in texts]
        # few rows are passed one by one: each trial loads the tokenizer again
        size = len(rows) // 2 if len(rows) > 8 else 1
        halves = [rows[start : start + size] for start in range(0, len(rows), size)]
        for part in [texts, lists] if texts and lists else halves:
            try:
                made = self._run(part)
            except Exception as error:
                yield from self._parts(part, _reason(error))
            else:
                yield from self._made(part, made)

    def _run(self, rows: list[dict[str, Any]]) -> list[Encoded]:
        # a trainer may not be able to sample from a file of one row: a single row is passed twice
        given = rows if len(rows) > 1 else [*rows, {**_with_other_answer(rows[0]), MARK: _AGAIN}]
        with tempfile.TemporaryDirectory() as folder:
            made = self.encode(Task(given, self.checkpoint, self.config, Path(folder), name=self.name))
        return [encoded for encoded in made if encoded[0] != _AGAIN]

    def _made(self, rows: list[dict[str, Any]], made: list[Encoded]) -> Iterator[dict[str, Any]]:
        by_number: dict[int, list[Encoded]] = {row[MARK]: [] for row in rows}
        for encoded in made:
            by_number[encoded[0]].append(encoded)
        for number, found in by_number.items():
            if len(found) == 1:
                yield {"row": number, **found[0][1]}
            elif found:
                yield {"row": number, "error": f"{len(found)} sequences were made of it"}
            else:
                yield {"row": number, "error": "it was left out, without an error"}


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a row, or of the prompt and the answers of a preference record."""
    keys = ("messages", "prompt", "chosen", "rejected", "completion")
    return [message for key in keys for message in row.get(key) or ()]


def _with_other_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Return a rated answer with another text, and other rows as they are.

    KTO compares each answer with that of another row, and a trainer may drop a row for which both are the same.
    """
    if "completion" not in row:
        return row
    *before, last = row["completion"]
    content = last.get("content") or ""
    other = [*content, {"type": "text", "text": "."}] if isinstance(content, list) else f"{content}."
    return {**row, "completion": [*before, {**last, "content": other}]}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the same kind that every sound configuration accepts."""
    if "messages" in row:
        return PLAIN
    prompt, answer = PLAIN["messages"][:1], PLAIN["messages"][1:]
    if "completion" in row:
        return {"prompt": prompt, "completion": answer, "label": True}
    return {"prompt": prompt, "chosen": answer, "rejected": [{"role": "assistant", "content": "No"}]}


def labelled(ids: Any, labels: Any) -> dict[str, Any]:
    """Return the columns of a chat row."""
    return {"input_ids": list(ids), "labels": list(labels)}


def shown_side(side: str, batch: Any, index: int) -> dict[str, Any]:
    """Return the columns of a side without its padding: its ids, and if tokens have a loss of their own its labels.

    Args:
        side: `chosen`, `rejected` or `completion`.
        batch: `input_ids`, `attention_mask`, and `labels` or a `completion_mask` if it has one: `(batch, length)`.
        index: The row of the side in the batch.
    """
    shown = [position for position, is_shown in enumerate(batch["attention_mask"][index].tolist()) if is_shown]
    ids = [batch["input_ids"][index][position].item() for position in shown]
    columns = {f"{side}_input_ids": ids}
    if "labels" in batch:
        columns[f"{side}_labels"] = [batch["labels"][index][position].item() for position in shown]
    elif "completion_mask" in batch:
        mask = [batch["completion_mask"][index][position].item() for position in shown]
        columns[f"{side}_labels"] = [token if is_scored else -100 for token, is_scored in zip(ids, mask, strict=True)]
    return columns


def _reason(error: BaseException) -> str:
    # one line of bounded length: some errors print all of the data
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    # `datasets` raises one error for every fault of a file, caused by the error that names the fault
    first = error.__cause__
    while first is not None and (earlier := first.__cause__ or first.__context__) is not None:
        first = earlier
    return f"{text}; from {_reason(first)}" if first is not None else text


def _numbering(load: Any, expected: int) -> Any:
    def numbered(dataset: Any) -> Any:
        if len(dataset) != expected:
            raise ValueError(f"the configuration's own data have {len(dataset)} rows, and the chat rows are {expected}")
        return dataset.add_column(MARK, list(range(expected)))

    @functools.wraps(load)
    def loading(*args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        if isinstance(loaded, dict):
            loaded["train"] = numbered(loaded["train"])
            return loaded
        return numbered(loaded)

    return loading


def _keep_marks() -> None:
    """Let `Dataset.map` carry the numbers of the rows, even if the runner removes columns and rows."""
    from datasets import Dataset

    for name in ("map", "filter", "save_to_disk"):
        setattr(Dataset, name, _in_this_process(getattr(Dataset, name)))
    original, original_filter = Dataset.map, Dataset.filter

    @functools.wraps(original)
    def keeping(self: Any, function: Any = None, *args: Any, **options: Any) -> Any:
        if MARK not in self.column_names or function is None:
            return original(self, function, *args, **options)
        removed = options.get("remove_columns")
        if removed is not None:
            names = [removed] if isinstance(removed, str) else removed
            options["remove_columns"] = [name for name in names if name != MARK]
        if options.get("batched") and not options.get("input_columns"):
            function = _marking(function)
        return original(self, function, *args, **options)

    @functools.wraps(original_filter)
    def filtering(self: Any, *args: Any, **options: Any) -> Any:
        # it uses `map` only to choose rows, and needs no columns
        Dataset.map = original
        try:
            return original_filter(self, *args, **options)
        finally:
            Dataset.map = keeping

    Dataset.map, Dataset.filter = keeping, filtering


def _in_this_process(method: Any) -> Any:
    @functools.wraps(method)
    def running(*args: Any, **options: Any) -> Any:
        # `datasets` starts a process even for one worker, and it imports the runner again
        return method(*args, **{**options, "num_proc": None} if options.get("num_proc") == 1 else options)

    return running


def _marking(function: Any) -> Any:
    """Return a batched function that also returns the row of each result if rows and results differ in number."""

    def marking(rows: Any, *args: Any, **options: Any) -> Any:
        # copies: the function may change the rows in place, and may be called again
        numbers = list(rows[MARK])
        given = {name: list(rows[name]) for name in rows}
        result = function(rows, *args, **options)
        made = len(numbers) if result is None else _length(result)
        # a function that unpairs carries every column along, and puts all chosen answers first
        is_carried = result is not None and MARK in result and len(result[MARK]) == made
        if made != len(numbers) and not is_carried:
            # fewer or more results than rows: pass each row again by itself
            found: list[int] = []
            for index, number in enumerate(numbers):
                alone = function({name: values[index : index + 1] for name, values in given.items()}, *args, **options)
                found += [number] * _length(alone)
            if len(found) != made:
                raise PackedError
            result[MARK] = found
        return result

    return marking


def _length(columns: Any) -> int:
    return next((len(values) for name, values in columns.items() if name != MARK), 0)
