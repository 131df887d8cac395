"""The rows of a run as files that runners read: ids and labels, or messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import training_template
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.records.files import sha256_file, write_json, write_text
from pytest_mistral_lora.training.export.bridge import ExportedRun
from pytest_mistral_lora.training.rows import ArrowFile
from pytest_mistral_lora.training.rows.loading import Split

_ROWS_PER_BATCH = 1000


def encoded_lines(split: Split) -> Iterator[dict[str, list[int]]]:
    """Yield `input_ids`, `attention_mask` (ones) and `labels` of each row, which runners train on unchanged."""
    for row in split.encoded:
        ids = list(row.input_ids)
        yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(row.labels or ())}


def message_lines(split: Split) -> Iterator[dict[str, Any]]:
    """Yield the role and text of each row's messages."""
    for row in split.rows:
        yield {"messages": [{"role": one["role"], "content": one["content"]} for one in row.messages]}


def write_chat_rows(run: ExportedRun, file: Path) -> None:
    """Write the chat rows of the training split in order, for `mistral-lora audit` to compare with the runner's."""
    write_text(file, "".join(f"{row.to_jsonl()}\n" for row in run.data.train.rows))


def write_json_lines(
    run: ExportedRun, folder: Path, lines: Callable[[Split], Iterator[Mapping[str, Any]]] = encoded_lines
) -> None:
    """Write `train.jsonl`, and `test.jsonl` if rows are held out."""
    for name, split in _named_splits(run, held_out="test"):
        with (folder / f"{name}.jsonl").open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines(split))


def write_dataset(run: ExportedRun, folder: Path) -> None:
    """Write splits `train` and, if rows are held out, `validation`, for `datasets.load_from_disk`."""
    # Only the files that every version of datasets reads. A description of the columns is left out: it would be in the
    # format of one version, and without it the columns are read from the Arrow file.
    sides = dict(_named_splits(run, held_out="validation"))
    write_json(folder / "dataset_dict.json", {"splits": list(sides)})
    for name, split in sides.items():
        (folder / name).mkdir()
        arrow = folder / name / "data-00000-of-00001.arrow"
        with ArrowFile(arrow) as file:
            for batch in _record_batches(encoded_lines(split)):
                file.write(batch)
        write_json(folder / name / "dataset_info.json", {})
        state: dict[str, Any] = {
            "_data_files": [{"filename": arrow.name}],
            "_fingerprint": sha256_file(arrow)[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": name,
        }
        write_json(folder / name / "state.json", state)


def _named_splits(run: ExportedRun, *, held_out: str) -> Iterator[tuple[str, Split]]:
    yield "train", run.data.train
    if run.data.held_out.rows:
        yield held_out, run.data.held_out


def _record_batches(lines: Iterator[dict[str, list[int]]]) -> Iterator[Any]:
    import pyarrow as pa

    schema = pa.schema(
        {"input_ids": pa.list_(pa.int32()), "attention_mask": pa.list_(pa.int8()), "labels": pa.list_(pa.int64())}
    )
    while batch := list(islice(lines, _ROWS_PER_BATCH)):
        yield pa.RecordBatch.from_pylist(batch, schema)


def why_not_messages(run: ExportedRun) -> str:
    """Return the reason why a run's rows cannot be given as messages, with the first such row; empty if they can.

    Each row is encoded like in a runner, as transformers' `apply_chat_template` does with the tokenizer that
    `AutoTokenizer` loads, and compared with the ids and labels that are trained on here.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(run.tokenizer, PreTrainedTokenizerFast):
        return f"transformers loads a {type(run.tokenizer).__name__} for {run.model}, which takes no chat template"
    template = ChatTemplate(run.tokenizer, training_template(run.encoder.tokenizer))
    for split in (run.data.train, run.data.held_out):
        for row, encoded in zip(split.rows, split.encoded, strict=True):
            found = _why_not_message(row, encoded, template)
            if found:
                return f"{row.place}: {found}"
    return ""


def _why_not_message(row: Row, encoded: EncodedRow, template: ChatTemplate) -> str:
    for message in row.messages:
        keys = {key for key, value in message.items() if value is not None}
        if row.tools or keys - {"role", "content", "weight"} or not isinstance(message.get("content"), str):
            return "it has more than roles and texts, and a table of all rows would give each the keys of the others"
    plain = [{"role": one["role"], "content": one["content"]} for one in row.messages]
    try:
        rendered = template.encode(Row(tuple(plain), None, row.place))
    except RowError as error:
        return f"the training template refuses it: {error.found}"
    ids, labels = rendered.input_ids, rendered.labels or (IGNORE_INDEX,) * len(rendered.input_ids)
    # a row that was cut here is compared as far as it goes: the runner cuts it too
    if len(ids) > len(encoded.input_ids) and ids[: len(encoded.input_ids)] == encoded.input_ids:
        ids, labels = ids[: len(encoded.input_ids)], labels[: len(encoded.input_ids)]
    if ids != encoded.input_ids:
        return "the training template gives other ids (docs/deviations.md names the ways)"
    return "" if labels == encoded.labels else "the training template gives other labels, as it does for a weight of 0"
