"""CPU seconds and memory of `check`, `import` and `stats` by the number of rows, each in a process of its own.

A seeded generator makes sound rows of one question and its answer, some 60 tokens each. Run it from a checkout:
python benchmarks/load.py --help
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer

ENCODED = "check encoded rows"
BARE = "check ids alone"
WORDS = ("river", "train", "answers", "seven", "letters", "green", "house", "near", "old", "town", "people", "books")


# A process counts the memory of the one that starts it as its own until it has its program: this one is small. Both
# outputs go to its stderr. Of several processes, the kernel tells the memory of the one that took most.
_MEASURE = """
import json, os, sys, time
start = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(child, 0)
code, seconds = os.waitstatus_to_exitcode(status), time.perf_counter() - start
print(json.dumps([code, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


def conversations(count: int) -> Iterator[tuple[str, str]]:
    """Yield the question and the answer of each row; no two are the same."""
    for number in range(count):
        random_words = random.Random(number)
        question, answer = (" ".join(random_words.choices(WORDS, k=size)) for size in (15, 30))
        yield f"Question {number}: {question}?", f"Answer {number}: {answer}."


def row(question: str, answer: str) -> dict[str, Any]:
    """Return a row."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sharegpt(question: str, answer: str) -> dict[str, Any]:
    """Return a record that `import` converts."""
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def encoded(oracle: Oracle, question: str, answer: str) -> dict[str, Any]:
    """Return an encoded row, as a trainer writes it out."""
    found = oracle.encode(row(question, answer))
    return {**row(question, answer), "input_ids": [*found.input_ids], "labels": [*(found.labels or ())]}


def bare(oracle: Oracle, question: str, answer: str) -> dict[str, Any]:
    """Return an encoded row without its messages: `check` reads the ids back."""
    made = encoded(oracle, question, answer)
    return {key: made[key] for key in ("input_ids", "labels")}


def measure(verb: str, words: Sequence[object], folder: Path) -> dict[str, float]:
    """Return what a verb takes, as the operating system counts it: its own processes are in the CPU time.

    Raises:
        SystemExit: If the verb fails.
    """
    command = [sys.executable, "-I", "-c", _MEASURE, sys.executable, "-m", "pytest_mistral_lora.cli", verb]
    with (folder / "output").open("w") as output:
        done = subprocess.run(
            [*command, *map(str, words)], cwd=folder, stdout=subprocess.PIPE, stderr=output, check=True
        )
    code, seconds, cpu_seconds, peak = json.loads(done.stdout)
    if code:
        raise SystemExit((folder / "output").read_text())
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), "mib": round(peak / 1024)}


def run(verb: str, count: int, tokenizer: str) -> dict[str, float]:
    """Make the rows of a verb, and return what it takes to read them."""
    oracle = Oracle(shipped_tokenizer(tokenizer))
    make: dict[str, Callable[[str, str], dict[str, Any]]] = {
        "check": row,
        "stats": row,
        "import": sharegpt,
        ENCODED: partial(encoded, oracle),
        BARE: partial(bare, oracle),
    }
    words = ["--to", "converted.jsonl"] if verb == "import" else ["--tokenizer", tokenizer]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        with file.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(make[verb](*pair)) + "\n" for pair in conversations(count))
        took = measure(verb.partition(" ")[0], [file.name, *words], Path(folder))
        return {"file_mib": round(file.stat().st_size / 2**20), **took}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON where it is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = ["check", "import", ENCODED, BARE, "stats"]
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000], help="numbers of rows")
    parser.add_argument(
        "--verbs", nargs="+", choices=verbs, default=verbs, help="verbs to measure; default: all of them"
    )
    parser.add_argument("--tokenizer", default="spm-v3", help="a shipped tokenizer; default: spm-v3")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    given = parser.parse_args(arguments)
    table = Table("verb", "rows", "MiB of the file", "CPU seconds", "CPU ms a row", "MiB", "seconds")
    figures = []
    for verb in given.verbs:
        for count in given.sizes:
            found = run(verb, count, given.tokenizer)
            figures.append({"verb": verb, "rows": count, **found})
            each = f"{1000 * found['cpu_seconds'] / count:.3f}"
            cells = (found["file_mib"], found["cpu_seconds"], each, found["mib"], found["seconds"])
            table.add_row(verb, f"{count:,}", *map(str, cells))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
