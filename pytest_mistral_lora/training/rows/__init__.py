"""Encoded rows in Arrow, in memory or mapped from a file: read one at a time, whatever their number.

The columns of a row: `input_ids` and `labels` (int32, one a token), `spans` (int32, six a span: turn or -1, role, kind,
start, end, supervised), and its origin: `line` (the bytes of its line), `number` (of the line) and `file`
(index among the data files).
"""

from pytest_mistral_lora.training.rows.dataset import (
    ArrowFile,
    ColumnBuilder,
    EncodedRows,
    Ints,
    ReparsedRows,
    RowDataset,
    RowTable,
    input_tokens_of,
    lengths_of,
)

__all__ = [
    "ArrowFile",
    "ColumnBuilder",
    "EncodedRows",
    "Ints",
    "ReparsedRows",
    "RowDataset",
    "RowTable",
    "input_tokens_of",
    "lengths_of",
]
