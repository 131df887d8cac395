"""Rows per second of the dataset pass, as a ratio to transformers' own encoding of the same rows.

The peer encodes each row with `apply_chat_template(..., return_assistant_tokens_mask=True)`, in one process: the least
that a trainer does with a row. The pass encodes each row with mistral-common, renders and encodes it through the chat
template, compares the two, and judges it. Run it from a checkout: python benchmarks/dataset_rows.py --help
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
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


def contenders(tokenizer: CheckpointTokenizer, file: Path, processes: int) -> dict[str, Callable[[], object]]:
    """Return what is measured, by name; everything is loaded, but for the processes of a pool."""
    template = str(ChatTemplate(tokenizer.fast).training_source)

    def judge(backend: str, *, compares: bool, processes: int) -> Callable[[], object]:
        plan = ScanPlan(tokenizer.path, backend, Policy(1_000_000), 0.0, compares, official=True)
        return partial(scan, plan, [DataFile(file, False)], tokenizer=tokenizer, processes=processes)

    return {
        PEER: partial(encode_with_transformers, tokenizer.fast, template, file),
        "pass, one process": judge("mistral-common", compares=True, processes=1),
        "pass, one process, backends not compared": judge("mistral-common", compares=False, processes=1),
        "pass, one process, backend chat-template": judge("chat-template", compares=True, processes=1),
        f"pass, {processes} processes, their start included": judge(
            "mistral-common", compares=True, processes=processes
        ),
    }


def measure(runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """Return the wall and CPU seconds of each run, the runs taking turns so that a busy moment hits all of them."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            start, cpu = time.perf_counter(), _cpu_seconds()
            run()
            seconds[name].append((time.perf_counter() - start, _cpu_seconds() - cpu))
    return seconds


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
    results: dict[str, Any] = {"machine": machine(), "rows": given.rows, "repetitions": given.repetitions}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in generated(given.rows)), encoding="utf-8")
        for name in given.tokenizer:
            runs = contenders(CheckpointTokenizer(shipped_tokenizer(name)), file, given.processes)
            results[name] = summarize(measure(runs, given.repetitions), given.rows)
            _print(name, results[name])
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2000, help="rows to make; default: 2000")
    parser.add_argument("--repetitions", type=int, default=5, help="times that each is measured; default: 5")
    parser.add_argument("--processes", type=int, default=max(2, cpus()), help="of the parallel pass; default: the CPUs")
    parser.add_argument("--tokenizer", nargs="+", default=["spm-v3", "tekken-240911"], help="shipped tokenizers")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    return parser.parse_args(arguments)


def _print(tokenizer: str, figures: dict[str, dict[str, float]]) -> None:
    table = Table("run", "rows per second", "times transformers", "by CPU time", title=tokenizer)
    for name, figure in figures.items():
        speed = f"{figure['rows_per_second']:,.0f}"
        table.add_row(name, speed, f"{figure['ratio']:.2f}", f"{figure['cpu_ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
