"""The rows of a batch that a run stopped at: named, and written down as the model saw them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pytest_mistral_lora.checkpoint.backends import Encoder
from pytest_mistral_lora.errors import NonFiniteError
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.training.rows.loading import Split
from pytest_mistral_lora.training.save import rendered

BAD_ROWS = "bad_rows.jsonl"
_NAMED = 20


def with_rows(error: NonFiniteError, rows: Sequence[int], split: Split, file: Path) -> NonFiniteError:
    """Return the error with the rows named.

    Args:
        error: Why the run stopped.
        rows: Places of the rows in `split`.
        split: The training rows.
        file: Where they are rendered.
    """
    places = [split.rows[row].place for row in rows]
    named = ", ".join(places[:_NAMED]) + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")
    return NonFiniteError(
        f"{error.found}; the rows: {named}",
        rows=rows,
        places=places,
        next_step=f"They are rendered in {file}. {error.next_step}",
    )


def write_rows(file: Path, error: NonFiniteError, split: Split, encoder: Encoder) -> None:
    """Write the rows of an error, one a line, each with its place, text, tokens and labels."""
    lines = [
        {"place": split.rows[row].place, **rendered(encoder, split.rows[row], split.encoded[row])} for row in error.rows
    ]
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
