"""Rows for the tests of the plugin."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROW: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven is prime."}]
}
NAMED = {**ROW, "name": "prime", "max_new_tokens": 8, "checks": ["eos", {"max_tokens": 9}]}
"""The row as a golden folder has it: with a name, and what its answer is held to."""


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
