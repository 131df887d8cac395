"""Rows per second of the dataset pass, as a ratio to transformers' own encoding of the same rows.

The peer encodes each row with `apply_chat_template(..., return_assistant_tokens_mask=True)`, in one process: the least
that a trainer does with a row. The pass encodes each row with mistral-common, renders and encodes it through the chat
template, compares the two, and judges it. Run it from a checkout: python benchmarks/dataset_rows.py --help
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rows import generated

from pytest_mistral_lora.chat.encoded import Policy
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.reading.chunks import DataFile, cpus
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.dataset.report import scan
from pytest_mistral_lora.conformance.dataset.rows import ScanPlan

PEER = "transformers, one process"


def encode_with_transformers(fast: Any, template: str, file: Path) -> None:
    """Encode every row of a file as a trainer with assistant masks does."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            fast.apply_chat_template(
                row["messages"],
                tools=row.get("tools"),
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )


def judge_file(tokenizer: CheckpointTokenizer, backend: str, file: Path, *, compares: bool, processes: int) -> None:
    """Make the pass over a file."""
    plan = ScanPlan(tokenizer.path, backend, Policy(1_000_000), 0.0, compares, official=True)
    scan(plan, [DataFile(file, False)], tokenizer=tokenizer, processes=processes)


def contenders(tokenizer: CheckpointTokenizer, processes: int) -> dict[str, Callable[[Path], object]]:
    """Return what is measured, by name; everything is loaded, but for the processes of a pool."""
    template = str(ChatTemplate(tokenizer.fast).training_source)

    def judge(backend: str, *, compares: bool, processes: int) -> Callable[[Path], object]:
        return lambda file: judge_file(tokenizer, backend, file, compares=compares, processes=processes)

    return {
        PEER: partial(encode_with_transformers, tokenizer.fast, template),
        "pass, one process": judge("mistral-common", compares=True, processes=1),
        "pass, one process, backends not compared": judge("mistral-common", compares=False, processes=1),
        "pass, one process, backend chat-template": judge("chat-template", compares=True, processes=1),
        f"pass, {processes} processes, their start included": judge(
            "mistral-common", compares=True, processes=processes
        ),
    }


def measure(
    runs: dict[str, Callable[[Path], object]], folder: Path, rows: int, repetitions: int
) -> dict[str, list[tuple[float, float]]]:
    """Return the wall and CPU seconds of each run, the runs taking turns so that a busy moment hits all of them.

    Each has rows of its own each time: all of them keep texts that they have encoded.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for repetition in range(repetitions):
        for index, (name, run) in enumerate(runs.items()):
            file = write_rows(folder / "rows.jsonl", rows, repetition * len(runs) + index)
            start, cpu = time.perf_counter(), _cpu_seconds()
            run(file)
            seconds[name].append((time.perf_counter() - start, _cpu_seconds() - cpu))
    return seconds


def write_rows(file: Path, count: int, seed: int = 0) -> Path:
    """Write generated rows, one at a time, and return their file."""
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in generated(count, seed))
    return file


def measure_sizes(tokenizer: str, sizes: Sequence[int], processes: int) -> list[dict[str, Any]]:
    """Return the seconds and the memory of the pass over files of several sizes, each in a process of its own."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            file = write_rows(Path(folder) / "rows.jsonl", size)
            for count in sorted({1, processes}):
                command = [sys.executable, __file__, "--pass-over", str(file), "--tokenizer", tokenizer]
                done = subprocess.run([*command, "--processes", str(count)], check=True, stdout=subprocess.PIPE)
                found.append({"rows": size, "processes": count, **json.loads(done.stdout)})
    return found


def pass_over(tokenizer: str, file: Path, processes: int) -> dict[str, float]:
    """Return what a pass over one file takes in this process and those that it starts: seconds, and peaks of MiB."""
    loaded = CheckpointTokenizer(shipped_tokenizer(tokenizer))
    _ = loaded.fast
    before, start, cpu = _peak("self"), time.perf_counter(), _cpu_seconds()
    ended, workers = threading.Event(), [0.0]

    def watch() -> None:
        while not ended.wait(0.2):
            workers.extend(_peak(process.pid) for process in multiprocessing.active_children())

    watcher = threading.Thread(target=watch)
    watcher.start()
    judge_file(loaded, "mistral-common", file, compares=True, processes=processes)
    ended.set()
    watcher.join()
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(_cpu_seconds() - cpu, 1),
        "mib_loaded": before,
        "mib": _peak("self"),
        "mib_of_a_worker": max(workers),
    }


def _peak(process: int | str | None) -> float:
    """Return the most MiB that a process had; 0 if it has ended, or without Linux."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024, 1)
    return 0.0


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def summarize(seconds: dict[str, list[tuple[float, float]]], rows: int) -> dict[str, dict[str, float]]:
    """Return for each run the median of its rows per second, and of its speed as a multiple of the peer's."""
    return {
        name: {
            "rows_per_second": round(rows / statistics.median(wall for wall, _ in times), 1),
            "ratio": _ratio(seconds[PEER], times, 0),
            "cpu_ratio": _ratio(seconds[PEER], times, 1),
        }
        for name, times in seconds.items()
    }


def _ratio(peer: list[tuple[float, float]], times: list[tuple[float, float]], clock: int) -> float:
    pairs = zip(peer, times, strict=True)
    return round(statistics.median(one[clock] / max(other[clock], 0.001) for one, other in pairs), 2)


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    import mistral_common
    import transformers

    versions = {"transformers": transformers.__version__, "mistral-common": mistral_common.__version__}
    return {"cpus": cpus(), "load": os.getloadavg()[0], "python": platform.python_version(), **versions}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON where it is asked for."""
    given = _options(arguments)
    if given.pass_over:
        sys.stdout.write(json.dumps(pass_over(given.tokenizer[0], given.pass_over, given.processes)))
        return
    results: dict[str, Any] = {"machine": machine(), "rows": given.rows, "repetitions": given.repetitions}
    for name in given.tokenizer:
        if given.sizes:
            results[name] = measure_sizes(name, given.sizes, given.processes)
            _print_sizes(name, results[name])
            continue
        runs = contenders(CheckpointTokenizer(shipped_tokenizer(name)), given.processes)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = summarize(measure(runs, Path(folder), given.rows, given.repetitions), given.rows)
        _print(name, results[name])
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2000, help="rows to make; default: 2000")
    parser.add_argument("--repetitions", type=int, default=5, help="times that each is measured; default: 5")
    parser.add_argument("--processes", type=int, default=max(2, cpus()), help="of the parallel pass; default: the CPUs")
    parser.add_argument("--tokenizer", nargs="+", default=["spm-v3", "tekken-240911"], help="shipped tokenizers")
    sizes = "measure time and memory of the pass over so many rows instead, such as 100000 1000000"
    parser.add_argument("--sizes", type=int, nargs="+", metavar="ROWS", help=sizes)
    parser.add_argument("--pass-over", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    return parser.parse_args(arguments)


def _print(tokenizer: str, figures: dict[str, dict[str, float]]) -> None:
    table = Table("run", "rows per second", "times transformers", "by CPU time", title=tokenizer)
    for name, figure in figures.items():
        speed = f"{figure['rows_per_second']:,.0f}"
        table.add_row(name, speed, f"{figure['ratio']:.2f}", f"{figure['cpu_ratio']:.2f}")
    Console().print(table)


def _print_sizes(tokenizer: str, figures: Sequence[dict[str, Any]]) -> None:
    table = Table(
        *("rows", "processes", "seconds", "CPU ms a row", "MiB", "of them before", "MiB of a worker"), title=tokenizer
    )
    for one in figures:
        each = f"{1000 * one['cpu_seconds'] / one['rows']:.2f}"
        cells = (
            one["rows"],
            one["processes"],
            one["seconds"],
            each,
            one["mib"],
            one["mib_loaded"],
            one["mib_of_a_worker"],
        )
        table.add_row(*map(str, cells))
    Console().print(table)


if __name__ == "__main__":
    main()
