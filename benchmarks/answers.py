"""Seconds of the checks of known answers beside the rest of a server check, at a running server.

Run it from a checkout: python benchmarks/answers.py --help
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pytest_mistral_lora.conformance.answer.checks import AnswerChecks
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.server.checks import ServerChecks
from pytest_mistral_lora.conformance.server_target import ServerChoice, ServerTarget
from pytest_mistral_lora.conformance.targets import Target

Seconds = tuple[float, float]
"""By the clock, and of CPU time of this process."""


def timed(work: Callable[[], object]) -> Seconds:
    """Return the seconds that some work takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def judge_all(cases: dict[str, Callable[[], Result]]) -> None:
    """Run every check."""
    for judge in cases.values():
        judge()


def measure(server: str, tokenizer: Path) -> dict[str, Seconds]:
    """Return the seconds of each part of a server check.

    Args:
        server: The server, as `serve-check` takes it.
        tokenizer: The tokenizer's file or folder.
    """
    target = ServerChoice.parse(server).target("served", Target("own", tokenizer), asks_answers=True)
    if not isinstance(target, ServerTarget):
        raise SystemExit("give a running server")
    return {
        "load the tokenizer": timed(lambda: target.oracle.encode_text("a")),
        "ask for the prompts": timed(lambda: target.answers),
        "judge the prompts": timed(lambda: judge_all(ServerChecks(target).cases())),
        "ask for the answers": timed(lambda: target.forced_answers),
        "judge the answers": timed(lambda: judge_all(AnswerChecks(target).cases())),
    }


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", metavar="NAME=URL", help="a running server that serves a probe")
    parser.add_argument("tokenizer", type=Path, help="the tokenizer's file or folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the seconds as JSON, too")
    args = parser.parse_args()
    seconds = measure(args.server, args.tokenizer)
    table = Table("part", "seconds", "CPU seconds of the check", box=box.SIMPLE)
    for part, (wall, cpu) in seconds.items():
        table.add_row(part, f"{wall:.2f}", f"{cpu:.2f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(seconds, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
