"""Rows per second of exact encoding, ids and labels, beside mistral-common alone and TRL's data path.

Run it from a checkout: python benchmarks/encode.py --help
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import rows
from rich import box
from rich.console import Console
from rich.table import Table

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.checkpoint.encoder import Encoder, make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

HERE = Path(__file__).parent
ALONE = "mistral-common alone: ids"
TRL = "TRL SFTTrainer: ids and labels"
ONE = "ours, one process: ids and labels"

Row = Mapping[str, Any]
Seconds = tuple[float, float]
"""By the clock, and of CPU time."""


def ours(encoder: Encoder, plain: Sequence[Row]) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Check and encode rows, as they are read of a file."""
    encoded = (encoder.encode(parse_row(row)) for row in plain)
    return [(row.input_ids, row.labels or ()) for row in encoded]


def mistral_common_alone(file: Path) -> Callable[[Sequence[Row]], list[list[int]]]:
    """Return mistral-common's own encoding, as its documentation does it; it has no labels."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = MistralTokenizer.from_file(str(file), mode=ValidationMode.finetuning)
    return lambda plain: [tokenizer.encode_chat_completion(ChatCompletionRequest(**row)).tokens for row in plain]


def trl(python: str, tokenizer: CheckpointTokenizer, folder: Path) -> Callable[[Sequence[Row]], Seconds]:
    """Return what times TRL's preparation in its own environment, with the template that says what is trained."""
    fast = tokenizer.fast
    fast.chat_template = str(ChatTemplate(fast).training_source)
    fast.save_pretrained(folder)

    def measure(plain: Sequence[Row]) -> Seconds:
        (folder / "rows.json").write_text(json.dumps(plain))
        command: list[str | Path] = [python, HERE / "encode_trl.py", folder, folder / "rows.json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        wall, cpu = json.loads(done.stdout.splitlines()[-1])
        return wall, cpu

    return measure


_encoder: Encoder


def _load(path: Path) -> None:
    global _encoder
    _encoder = make_encoder("mistral-common", CheckpointTokenizer(path))
    ours(_encoder, [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])


def _encode(plain: Sequence[Row]) -> list[tuple[Sequence[int], Sequence[int]]]:
    return ours(_encoder, plain)


def in_processes(pool: ProcessPoolExecutor, plain: Sequence[Row]) -> int:
    """Encode rows in the processes of a pool, a few hundred at a time; what they send back is counted."""
    parts = [plain[start : start + 250] for start in range(0, len(plain), 250)]
    return sum(len(part) for part in pool.map(_encode, parts))


def timed(run: Callable[[Sequence[Row]], object], plain: Sequence[Row]) -> Seconds:
    """Return how long a run took."""
    start, cpu = time.perf_counter(), time.process_time()
    run(plain)
    return time.perf_counter() - start, time.process_time() - cpu


def measure(path: Path, parts: Sequence[Sequence[Row]], given: argparse.Namespace) -> dict[str, list[Seconds]]:
    """Return the times of each contestant; they take turns, so that a busy moment hits all of them.

    Each repetition has rows of its own, a part of those given: ours keeps texts that it has encoded.
    """
    tokenizer = CheckpointTokenizer(path)
    pools = {
        count: ProcessPoolExecutor(count, get_context("spawn"), _load, (path,))
        for count in given.processes
        if count > 1
    }
    encode = mistral_common_alone(path)
    runs: dict[str, Callable[[Sequence[Row]], Seconds]] = {
        ALONE: partial(timed, encode),
        ONE: partial(timed, partial(ours, make_encoder("mistral-common", tokenizer))),
        **{f"ours, {n} processes": partial(timed, partial(in_processes, pool)) for n, pool in pools.items()},
    }
    with tempfile.TemporaryDirectory() as folder:
        if given.peers_python:
            runs[TRL] = trl(given.peers_python, tokenizer, Path(folder))
        for run in runs.values():
            run(parts[0])  # once for nothing: processes start
        seconds: dict[str, list[Seconds]] = {name: [] for name in runs}
        for plain in parts[1:]:
            for name, run in runs.items():
                seconds[name].append(run(plain))
    for pool in pools.values():
        pool.shutdown()
    return seconds


def summarize(seconds: Mapping[str, Sequence[Seconds]], count: int) -> dict[str, dict[str, float | None]]:
    """Return rows per second, and speed as a multiple of mistral-common's and TRL's.

    One process is compared by its CPU time, which other programs on the machine disturb less; several by the clock.
    """
    return {
        name: {
            "rows_per_second": round(count / statistics.median(wall for wall, _ in times), 1),
            "times_mistral_common": _ratio(seconds[ALONE], times, name),
            "times_trl": _ratio(seconds[TRL], times, name) if TRL in seconds else None,
        }
        for name, times in seconds.items()
    }


def _ratio(peer: Sequence[Seconds], times: Sequence[Seconds], name: str) -> float:
    clock = 0 if "processes" in name else 1
    return round(statistics.median(other[clock] / one[clock] for one, other in zip(times, peer, strict=True)), 2)


def real_rows(count: int, longest: int = 1500) -> Iterator[Row]:
    """Yield chats up to the last answer within this many characters."""

    def cut(chat: Row) -> Row:
        messages, said = [], 0
        for message in chat["messages"]:
            said += len(message["content"])
            if said > longest:
                break
            messages.append(message)
        return {"messages": messages[: len(messages) // 2 * 2]}

    return islice((row for row in map(cut, rows.chats()) if row["messages"]), count)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON where it is asked for."""
    given = _options(arguments)
    count = given.rows * (given.repetitions + 1)
    plain = list(rows.generated(count) if given.generated else real_rows(count))
    each = len(plain) // (given.repetitions + 1)
    parts = [plain[start : start + each] for start in range(0, each * (given.repetitions + 1), each)]
    found: dict[str, Any] = {"rows": each, "load": os.getloadavg()[0], "cpus": os.cpu_count()}
    for name in given.tokenizer:
        found[name] = summarize(measure(shipped_tokenizer(name), parts, given), each)
        _show(name, found[name])
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rows", type=int, default=1000, help="rows of each repetition, and of one before; default: 1000")
    add("--generated", action="store_true", help="generated rows instead of real chats, tools among them")
    add("--repetitions", type=int, default=5, help="times that each is measured; default: 5")
    add("--processes", type=int, nargs="+", default=[2], help="pools to measure; default: 2")
    add("--tokenizer", nargs="+", default=["spm-v3", "tekken-240911"], help="shipped tokenizers")
    add("--peers-python", default=sys.executable if find_spec("trl") else None, help="a Python that has TRL")
    add("--json", type=Path, metavar="PATH", help="write the figures there too")
    return parser.parse_args(arguments)


def _show(tokenizer: str, figures: Mapping[str, Mapping[str, float | None]]) -> None:
    table = Table("run", title=tokenizer, box=box.MARKDOWN)
    for name in ("rows per second", "times mistral-common", "times TRL"):
        table.add_column(name, justify="right")
    for name, one in figures.items():
        ratio = "not run" if one["times_trl"] is None else f"{one['times_trl']:.2f}"
        table.add_row(name, f"{one['rows_per_second']:,.0f}", f"{one['times_mistral_common']:.2f}", ratio)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
