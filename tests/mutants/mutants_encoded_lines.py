"""Lines that cannot be read, or are not the rows of the source."""

from __future__ import annotations

import json

from bench_encoded import encode
from gallery import Artifact, mutant


@mutant("ML501 ML506")
def unreadable_line(artifact: Artifact) -> None:
    """A line is cut off in the middle."""
    artifact["lines"][0] = json.dumps(artifact["lines"][0])[:100]


@mutant("ML502 ML506", says="rows are not there: 1")
def dropped_row(artifact: Artifact) -> None:
    """A row was filtered."""
    del artifact["lines"][1]


@mutant("ML502 ML506", "I58", says="was dropped: TypeError")
def refused_row(artifact: Artifact) -> None:
    """The trainer reported an error for a row."""
    artifact["lines"][1] = {"row": 1, "error": "TypeError: encode_assistant_message() missing 2 arguments"}


@mutant("ML503 ML506", says="comes again")
def doubled_row(artifact: Artifact) -> None:
    """A sampler fills the last batch with the first rows."""
    artifact["lines"].append(artifact["lines"][0])


@mutant("ML504")
def shuffled(artifact: Artifact) -> None:
    """The rows were shuffled before they were written."""
    artifact["lines"][:2] = artifact["lines"][1::-1]


@mutant("ML505", says="but of row 2")
def wrong_numbers(artifact: Artifact) -> None:
    """The rows have one another's numbers."""
    lines = artifact["lines"]
    lines[1]["row"], lines[2]["row"] = 2, 1
    lines[1:3] = lines[2:0:-1]


@mutant("ML505", says="of a dataset of 4 rows")
def foreign_row(artifact: Artifact) -> None:
    """There is a row that is not in the dataset."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    artifact["lines"].append({"row": 4, **row, **encode(row)})
