from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from dataset_recipes import Target, make_target, said, v3, write_rows

from pytest_mistral_lora.chat.encoded import Policy
from pytest_mistral_lora.chat.reading import chunks
from pytest_mistral_lora.chat.reading import chunks as pool
from pytest_mistral_lora.chat.reading.chunks import CHUNK_LINES, Chunk, DataFile
from pytest_mistral_lora.conformance.dataset.checks import dataset_results
from pytest_mistral_lora.conformance.dataset.lengths import percentile
from pytest_mistral_lora.conformance.dataset.report import scan
from pytest_mistral_lora.conformance.dataset.rows import ScanPlan
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.errors import InputError

ROOT = Path(__file__).parents[2]
PLAN = ScanPlan(v3().path, "mistral-common", Policy(4096), 0.0, compares=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_progress_bar_is_drawn_on_a_terminal_if_the_pass_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [DataFile(write_rows(tmp_path / "rows.jsonl", [said("a", "b")] * 50), False)]
    short, captured, drawn = Terminal(), io.StringIO(), Terminal()
    scan(PLAN, files, tokenizer=v3(), processes=1, progress=short)
    monkeypatch.setattr(pool, "MANY_BYTES", 100)
    scan(PLAN, files, tokenizer=v3(), processes=1, progress=captured)
    scan(PLAN, files, tokenizer=v3(), processes=1, progress=drawn)
    assert (short.getvalue(), captured.getvalue()) == ("", "")
    assert "Judging rows" in drawn.getvalue()


def test_a_file_that_grows_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [said("a", "b")] * (CHUNK_LINES + 1))
    errors: list[InputError] = []
    read = chunks.chunks([DataFile(path, False)], errors.append)
    next(read)
    with path.open("a") as file:
        file.write("{}\n")
    list(read)
    assert [(error.found, str(error.place)) for error in errors] == [("the file changed while it was read", str(path))]


def test_a_huge_line_is_skipped_unread(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(300 * 1024 * 1024)
        file.seek(0, 2)
        file.write(b"\n" + json.dumps(said("a", "b")).encode())
    passed = scan(PLAN, [DataFile(path, False)], tokenizer=v3(), processes=1)
    [finding] = passed.findings.of("ML601")
    assert (finding.found, str(finding.place)) == (f"the row has {300 * 2**20 + 1:,} bytes", f"{path}:1")
    assert len(passed.table) == 1


def test_a_row_that_is_nested_too_deeply_is_a_finding(tmp_path: Path) -> None:
    rows = [said("a", "b"), "[" * 100_000, '{"messages": ' + "9" * 10_000 + "}"]
    passed = scan(PLAN, [DataFile(write_rows(tmp_path / "rows.jsonl", rows), False)], tokenizer=v3(), processes=1)
    assert len(list(passed.findings.of("ML601"))) == 2


def line_counter(plan: None) -> Callable[[Chunk], int]:
    return count_lines


def count_lines(chunk: Chunk) -> int:
    return len(chunk.lines)


@pytest.mark.slow
def test_chunks_in_flight_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [said("a", "b")] * 2000)
    monkeypatch.setattr(chunks, "CHUNK_LINES", 50)
    read = 0

    refused: list[InputError] = []

    def counting() -> Iterator[Chunk]:
        nonlocal read
        for chunk in chunks.chunks([DataFile(path, False)], refused.append):
            read += 1
            yield chunk

    for done, _ in enumerate(pool.in_order(line_counter, None, counting(), 2), start=1):
        assert read <= done + 5
    assert (read, refused) == (40, [])


def test_any_number_of_processes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [said("a", "b")] * 3)
    asked: list[int] = []

    class Pool(ProcessPoolExecutor):
        def __init__(self, most: int, *given: Any) -> None:
            asked.append(most)
            super().__init__(most, *given)

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Pool)
    found = pool.in_order(line_counter, None, chunks.chunks([DataFile(path, False)], lambda error: None), 2**31)
    assert [lines for lines, _ in found] == [3]
    assert asked == [max(pool.cpus(), 61)]


def test_the_process_that_asks_works_too_and_keeps_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [said("a", "b")] * 3000)
    monkeypatch.setattr(chunks, "CHUNK_LINES", 25)
    read: list[int] = []
    here: list[int] = []

    def counting() -> Iterator[Chunk]:
        for chunk in chunks.chunks([DataFile(path, False)], lambda error: None):
            read.append(chunk.lines[0][0])
            yield chunk

    def count(chunk: Chunk) -> int:
        here.append(chunk.lines[0][0])
        return len(chunk.lines)

    results = []
    for result in pool.in_order(line_counter, None, counting(), 2, count):
        results.append(result)
        # as many results as wait for an earlier one, and few chunks
        assert len(read) <= len(results) + 70
    assert results == [(25, sum(map(len, path.read_bytes().splitlines(keepends=True)[:25])))] * 120
    assert 0 < len(here) < 120


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("1", 1), ("", None)])
def test_the_number_of_processes_can_be_set(
    value: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [DataFile(write_rows(tmp_path / "rows.jsonl", [said("a", "b")]), False)]
    monkeypatch.setenv("MISTRAL_LORA_PROCESSES", value)
    assert chunks.processes_for(files) == 1
    monkeypatch.setattr(chunks, "MANY_BYTES", 1)
    assert chunks.processes_for(files) == (expected or chunks.cpus())


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²"])
def test_a_number_of_processes_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_LORA_PROCESSES", value)
    with pytest.raises(InputError, match=r"MISTRAL_LORA_PROCESSES"):
        chunks.processes_for([])


def test_a_script_without_a_guard_is_told_what_to_do(tmp_path: Path) -> None:
    target = make_target(tmp_path, [said("a", "b")])
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from pytest_mistral_lora.conformance.dataset.rows import ScanPlan\n"
        "from pytest_mistral_lora.chat.reading.chunks import DataFile\n"
        "from pytest_mistral_lora.chat.encoded import Policy\n"
        "from pytest_mistral_lora.conformance.dataset.report import scan\n"
        f"plan = ScanPlan(Path({str(v3().path)!r}), 'mistral-common', Policy(4096), 0.0, False)\n"
        f"scan(plan, [DataFile(Path({str(target.recipe.data.train[0])!r}), False)], processes=2)\n"
    )
    process = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert 'below `if __name__ == "__main__":`, or give processes=1' in process.stderr


@pytest.mark.parametrize(("percent", "value"), [(1, 1), (25, 1), (26, 2), (50, 2), (95, 4), (100, 4)])
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(percent: int, value: int) -> None:
    assert percentile({4: 1, 1: 1, 3: 1, 2: 1}, percent) == value
    assert percentile({}, percent) == 0


@pytest.mark.parametrize("change", [("eos_token", "''"), ("[/INST]", " [/INST]")])
def test_a_long_row_is_named_and_not_printed(change: tuple[str, str], tmp_path: Path) -> None:
    target = make_target(tmp_path, [said("long " * 5000, "b", system="s"), said("a", "b", **{"x" * 9000: 1})])
    results = results_through(v3().oracle.chat_template().replace(*change), target)
    [different], [unknown] = results["backends-agree"].findings, results["rows-are-valid"].findings
    assert (different.rule, different.row, unknown.rule) == ("ML603", "", "ML601")
    assert all(len(finding.text()) < 6000 for finding in (different, unknown))


LONG_TALK = "messages | length > 4"
LONG_PROMPT = f"{LONG_TALK} and messages[-1]['role'] == 'user'"
REFUSED = "raise_exception('Conversation must start with a user message, got assistant.')"
FAULTS = ("{{%- set messages = messages[-1:] if {} else messages %}}", "{{{{- " + REFUSED + " if {} }}}}")


@pytest.mark.parametrize("condition", [LONG_TALK, LONG_PROMPT])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_template_that_loses_the_history_of_a_long_talk_is_red(condition: str, fault: str, tmp_path: Path) -> None:
    talk = [f"{word} {number}" for number in range(4) for word in ("Question", "Answer")]
    target = make_target(tmp_path, [said(*talk[:2]), said("Hi.", "Yes?"), said(*talk), said(*talk[:5], "Other.")])
    sound = v3().oracle.chat_template()
    case = results_through(sound, target)["backends-agree"]
    # the longest row has a prompt of each shape
    assert (case.findings, dict(case.facts)["prompts"]) == ((), {"compared": 4, "refused": 0, "left_out": 0})
    findings = results_through(fault.format(condition) + sound, target)["backends-agree"].findings
    assert {finding.rule for finding in findings} == {"ML603"}
    # each row that differs, or the first row of those whose prompts alone differ
    assert {finding.place.record for finding in findings} == ({3, 4} if condition == LONG_TALK else {3})
    assert all(("in a prompt" in finding.found) == (condition == LONG_PROMPT) for finding in findings)


def results_through(source: str, target: Target) -> dict[str, Result]:
    """Judge a dataset by mistral-common and another chat template."""
    sound = v3().fast.chat_template
    try:
        v3().fast.chat_template = source
        # the tokenizer keeps its template from the first use on
        vars(v3()).pop("template", None)
        return dataset_results(target)
    finally:
        v3().fast.chat_template = sound
        vars(v3()).pop("template", None)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "dataset_rows.py", "--rows", "12", "--repetitions", "1"]
    command += ["--tokenizer", "spm-v3", "--json", tmp_path / "figures.json"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["spm-v3"]["transformers, one process"]["ratio"] == 1.0
    assert all(figure["rows_per_second"] > 0 for figure in figures["spm-v3"].values())
