"""Instructions that `check` takes for a row, and for the same row as ids alone, as valgrind counts them.

Other programs on the machine change no count. Run it from a checkout: python benchmarks/instructions.py --help
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rows import generated

from pytest_mistral_lora.chat.oracle import Oracle

_VALGRIND = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
_MILLION = 10**6


def main(arguments: Sequence[str] | None = None) -> None:
    """Count the instructions of both forms of the same rows, and print them."""
    given = _options(arguments)
    oracle = Oracle.load(given.tokenizer)
    chat = list(generated(given.rows))
    encoded = [oracle.encode(row) for row in chat]
    ids = [{"input_ids": [*one.input_ids], "labels": [*(one.labels or ())]} for one in encoded]
    table = Table("rows", "start", "a row", "times the chat row", box=box.MARKDOWN, title="millions of instructions")
    counts = {name: _count(rows, given.tokenizer) for name, rows in (("chat", chat), ("ids alone", ids))}
    for name, (start, each) in counts.items():
        table.add_row(name, f"{start:,.0f}", f"{each:.2f}", f"{each / counts['chat'][1]:.2f}")
    Console(width=100).print(table)


def _count(rows: Sequence[dict[str, Any]], tokenizer: str) -> tuple[float, float]:
    """Return the millions of instructions of a check of one row, and those that each further row adds."""
    with tempfile.TemporaryDirectory() as folder:
        one, all_rows = (_of_check(part, tokenizer, Path(folder)) for part in (rows[:1], rows))
    return one, (all_rows - one) / (len(rows) - 1)


def _of_check(rows: Sequence[dict[str, Any]], tokenizer: str, folder: Path) -> float:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    check = ("check", "rows.jsonl", "--tokenizer", tokenizer, "--no-cache")
    # one process and one order of hashes: the count is nearly the same each time
    environment = {**os.environ, "PYTHONHASHSEED": "0", "MISTRAL_LORA_PROCESSES": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*_VALGRIND, sys.executable, "-m", "pytest_mistral_lora.cli", *check],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    found = re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)
    if done.returncode or found is None:
        raise SystemExit(f"check ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return int(found[1].replace(",", "")) / _MILLION


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1000, help="rows to make, at least 2; default: 1000")
    parser.add_argument("--tokenizer", default="spm-v3", help="a shipped tokenizer; default: spm-v3")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
