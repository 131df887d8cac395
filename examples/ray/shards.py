"""Import and check the shards of a dataset on the workers of a Ray cluster: see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import ray

from pytest_mistral_lora.chat.encoded import Policy
from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.conformance.dataset.repeats import sketches_available
from pytest_mistral_lora.conformance.dataset.report import judge_shard, report
from pytest_mistral_lora.conformance.dataset.rows import ScanPlan
from pytest_mistral_lora.conformance.dataset.tally import DatasetTally
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.formats.convert import Source, import_rows
from pytest_mistral_lora.report.tables import figure_lines, length_lines


@ray.remote
def import_shard(source: Path, to: Path) -> int:
    """Convert a shard to rows, and return their number."""
    return import_rows([Source(source)], to).rows


# The same function judges a file in one process, in two, or here. A worker loads the tokenizer once.
judge = ray.remote(judge_shard)


def import_shards(sources: list[Path], folder: Path) -> list[Path]:
    """Convert each shard on a worker, and return the files of rows in the order of the shards."""
    files = [folder / f"{number:05d}.jsonl" for number in range(len(sources))]
    ray.get([import_shard.remote(*pair) for pair in zip(sources, files, strict=True)])
    return files


def check_shards(plan: ScanPlan, files: list[DataFile]) -> dict[str, Result]:
    """Judge each file on a worker, and return the result of each check of the whole dataset."""
    waiting = [judge.remote(plan, index, file) for index, file in enumerate(files)]
    tally = DatasetTally()
    while waiting:
        # in the order in which they end: the report does not depend on it
        (done,), waiting = ray.wait(waiting)
        tally.extend(ray.get(done))
    return report(tally, files, plan, place="--held-out", no_comparison="not compared")


def main() -> int:
    """Import, judge, and print the findings and the figures; return 1 if there is an error among them."""
    args = options()
    ray.init(address=args.address, num_cpus=None if args.address else args.workers, log_to_driver=False)
    args.rows.mkdir(parents=True)
    files = import_shards(args.sources, args.rows)
    tokenizer = shipped_tokenizer(args.tokenizer) if args.tokenizer in SHIPPED else Path(args.tokenizer)
    policy = Policy(max_length=args.max_length)
    plan = ScanPlan(tokenizer, "mistral-common", policy, args.held_out, compares=False, sketches=sketches_available())
    results = check_shards(plan, [DataFile(file) for file in files])
    findings = [finding for result in results.values() for finding in result.findings]
    figures: dict[str, Any] = dict(results["statistics"].facts)
    if args.json:
        print(json.dumps({"findings": [finding.to_json() for finding in findings], "figures": figures}))
    else:
        print(*(finding.text() for finding in findings), sep="\n")
        print(*figure_lines(figures, 100), *length_lines(figures, 100), sep="\n")
    return int(any(finding.severity == "error" for finding in findings))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path, nargs="+", help="shards in any format, on a disk that all workers see")
    parser.add_argument("--rows", type=Path, required=True, help="new folder for the rows, on such a disk")
    parser.add_argument("--tokenizer", required=True, help="name of a shipped tokenizer, or a path on such a disk")
    parser.add_argument("--held-out", type=float, default=0.0, help="fraction of the rows that is held out")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--address", help="a running cluster; default: one of this machine")
    parser.add_argument("--workers", type=int, default=2, help="workers of a cluster of this machine")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
