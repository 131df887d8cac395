"""Record the verdicts on everything that the tests break: the proof that a rebuilding changed nothing.

    $ python scripts/record_verdicts.py --output /tmp/before.json
    $ python scripts/record_verdicts.py --output /tmp/after.json --against /tmp/before.json

A record has one entry for each mutant of the gallery, each example of a rule and its healthy twin, each tokenizer with
the packaged rows, and each check of the embedded default: the rule, severity and place of every finding, and the exit
code. Paths below the folder of a case are relative to it. A record is compared with another, and never committed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "mutants"), str(ROOT / "tests" / "support")]

Artifact = dict[str, Any]
Change = Callable[[Artifact], None]
Entry = dict[str, Any]

PACKAGED, DEFAULT = "packaged", "default"
"""The parts of a record beside the subjects of the gallery."""


def main() -> int:
    """Record the parts that are asked for, and compare them with an earlier record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="subjects of the gallery, 'packaged' or 'default' (default: all)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="write the record to this file")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with this record; exit 1 if it differs")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="record only each N-th case of a subject")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes at the same time (default: 2)")
    args = parser.parse_args()
    from gallery import benches

    parts = args.parts or [*benches(), PACKAGED, DEFAULT]
    jobs = [(part, number, args.processes, args.every) for part in parts for number in range(args.processes)]
    record: dict[str, Entry] = {}
    context = multiprocessing.get_context("spawn")  # a process that has imported torch cannot be forked safely
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        for job, entries in zip(jobs, pool.map(_record_part, jobs), strict=True):
            record.update(entries)
            print(f"{job[0]} {job[1] + 1}/{args.processes}: {len(entries)} cases", file=sys.stderr, flush=True)
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    args.output.write_text(text, encoding="utf-8")
    if args.against is None:
        return 0
    before = json.loads(args.against.read_text(encoding="utf-8"))
    # a record of some parts is compared with the same parts
    kinds = {name.partition(":")[0] for name in record}
    expected = {name: entry for name, entry in before.items() if name.partition(":")[0] in kinds}
    if args.every > 1:
        expected = {name: entry for name, entry in expected.items() if name in record}
    return _compare(expected, json.loads(text))


def _compare(before: dict[str, Entry], after: dict[str, Entry]) -> int:
    """Print each case that differs, and return 1 if one does."""
    different = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    for name in different:
        print(name)
        for sign, entry in (("-", before.get(name, {})), ("+", after.get(name, {}))):
            other = (after if sign == "-" else before).get(name, {})
            for key, value in entry.items():
                if value != other.get(key):
                    print(f"  {sign} {key}: {json.dumps(value, ensure_ascii=False)}")
    print(f"{len(after)} cases, {len(different)} differ")
    return int(bool(different))


def _record_part(job: tuple[str, int, int, int]) -> dict[str, Entry]:
    """Return the entries of one process for one part."""
    part, number, processes, every = job
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1", OMP_NUM_THREADS="1")
    warnings.simplefilter("ignore")
    if part == DEFAULT:
        return _default() if number == 0 else {}
    if part == PACKAGED:
        return dict(_packaged()) if number == 0 else {}
    cases = list(_cases(part))[::every]
    return {f"{part}:{name}": _judged(part, change) for name, change in cases[number::processes]}


def _cases(subject: str) -> Iterator[tuple[str, Change]]:
    """Yield the name and the change of each case of a subject: the sound artifact, mutants, examples, twins."""
    from gallery import benches, examples, mutants

    yield "sound", lambda artifact: None
    for mutant in mutants(benches()[subject]):
        yield f"mutant {mutant.name}", mutant.change
    for rule, example in examples(subject).items():
        yield f"{rule} broken", example.broken
        yield f"{rule} sound", example.sound


def _judged(subject: str, change: Change) -> Entry:
    """Make an artifact, change it, and return what the suite and `check` say of it."""
    from gallery import benches

    with tempfile.TemporaryDirectory(prefix="verdict-") as folder:
        home = Path(folder).resolve()
        bench = benches()[subject].BENCH
        artifact = bench.make(home)
        change(artifact)
        try:
            findings = [(each.rule, each.severity, _relative(str(each.place), home)) for each in bench.judge(artifact)]
        except Exception as error:
            return {"suite": f"{type(error).__name__}: {_relative(str(error), home)}"}
        entry: Entry = {"suite": sorted(findings)}
        for words in _words(subject, home, artifact):
            entry[" ".join(words)] = _checked(words, home)
        return entry


def _words(subject: str, home: Path, artifact: Artifact) -> list[list[str]]:
    """Return the command lines that judge the files of an artifact; none for one that is not in files."""
    if subject in ("adapter", "transcript"):
        return [["check", "lora", "--base", "base"]]
    if subject == "manifest":
        return [["check", "lora", "--base", "base"], ["check", "merged", "--base", "base"]]
    if subject == "merged":
        adapter = ["lora"] if artifact["adapter_at_hand"] else []
        return [["check", "merged", *adapter, "--base", "base"]]
    if subject == "gguf":
        return [["check", "merged.gguf", "--base", "base"], ["check", "lora.gguf", "--base", "base"]]
    if subject == "tokenizer":
        oracle = ["--oracle", str(artifact["oracle"])] if artifact["oracle"] else []
        return [["check", "checkpoint", "--examples", "1", *oracle]]
    if subject == "dataset":
        if artifact["alone"]:
            return [["check", "rows.jsonl", "--tokenizer", "spm-v3"]]
        return [["check", "recipe.yaml", "--examples", "1"]]
    if subject == "encoded":
        if artifact["saved"]:
            return [["check", "packed.jsonl", "--tokenizer", "spm-v3"]]
        lines = ["audit", "lines.jsonl", "--tokenizer", "spm-v3", "--dataset", "dataset.jsonl"]
        return [lines, ["check", "lines.jsonl", "packed.jsonl", "--tokenizer", "spm-v3"]]
    return []


def _checked(words: list[str], home: Path) -> Entry:
    """Run a verb in this process, and return its findings and its exit code."""
    from pytest_mistral_lora.cli import main as run_verb

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(home), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = run_verb([*words, "--json"])
        except SystemExit as error:
            code = int(error.code or 0)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {_relative(str(error), home)}"}
    if code not in (0, 1):
        return {"code": code, "error": _relative(errors.getvalue(), home).splitlines()[:1]}
    if words[0] == "audit":  # a finding a line, and a summary
        lines = map(json.loads, output.getvalue().splitlines())
        found = [(line["rule"], line["severity"], _relative(line["place"], home)) for line in lines if "rule" in line]
        return {"code": code, "findings": sorted(found)}
    report = json.loads(output.getvalue())
    findings = [
        (check["nodeid"], finding["rule"], finding["severity"], _relative(finding["place"], home))
        for check in report["checks"]
        for finding in check["findings"]
    ]
    unchecked = sorted(check["nodeid"] for check in report["checks"] if check["not_checked"])
    return {"code": code, "findings": sorted(findings), "not_checked": unchecked}


def _packaged() -> Iterator[tuple[str, Entry]]:
    """Yield the verdict of `check` on the packaged rows, and on each tokenizer that mistral-common ships."""
    from pytest_mistral_lora.chat.oracle import SHIPPED
    from pytest_mistral_lora.records.goldens import packaged_cases

    with tempfile.TemporaryDirectory(prefix="verdict-") as folder:
        home = Path(folder).resolve()
        rows = home / "rows.jsonl"
        rows.write_text("".join(case.row.to_jsonl() + "\n" for case in packaged_cases()), encoding="utf-8")
        for name in SHIPPED:
            yield f"{PACKAGED}:rows {name}", _checked(["check", "rows.jsonl", "--tokenizer", name], home)
    with tempfile.TemporaryDirectory(prefix="verdict-") as folder:
        home = Path(folder).resolve()
        yield f"{PACKAGED}:tokenizers", _checked(["check", "--no-train"], home)


def _default() -> dict[str, Entry]:
    """Return the outcome of each check of `pytest --mistral-golden`, with the tiny train."""
    with tempfile.TemporaryDirectory(prefix="verdict-") as folder:
        words = ["--mistral-golden", "--mistral-report", "report.json", "-q", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *words]
        run = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        report = json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))
    outcomes = {f"{DEFAULT}:{check['nodeid']}": {"outcome": check["outcome"]} for check in report["checks"]}
    return {**outcomes, f"{DEFAULT}:exit code": {"code": run.returncode}}


def _relative(text: str, home: Path) -> str:
    """Return a text without the folders that every run names anew."""
    text = re.sub(rf"{re.escape(str(home))}/?", "", text)
    text = re.sub(r"/tmp/[\w.-]+/", "TMP/", text)
    return re.sub(r"train-\w+-[\w]{8}\b|127\.0\.0\.1:\d+|tmp\w{8}\b", "#", text)


if __name__ == "__main__":
    sys.exit(main())
