"""A kind of record and a type of chunk that tests bring along go through the verbs, sound and with a fault."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import toy_kind
from each_oracle import oracle_named
from toy_chunk import ASIDE
from toy_kind import POEM
from toys import Data, asides, ids_alone, poems, toys_known, with_ids, write_lines

from pytest_mistral_lora.chat.chunks.registry import chunk_types
from pytest_mistral_lora.chat.kinds.records import parse_trained
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.records import goldens

TOKENIZER = "spm-v3"
WRONG = "Caf\u00c3\u00a9"
"""A word that was read with a wrong encoding."""


class Toy(NamedTuple):
    """What the tests need of a toy.

    Attributes:
        records: Returns sound records.
        set_text: Changes a text of a record.
        field: The field that rules name for this text.
        value: The field that has it.
        without_turns: The checks of turns, if it has none.
    """

    records: Callable[[], list[Data]]
    set_text: Callable[[Data, Any], None]
    field: str
    value: str
    without_turns: frozenset[str] = frozenset()


def set_line(record: Data, text: str) -> None:
    record["poem"][1] = text


def set_aside(record: Data, text: str) -> None:
    record["messages"][1]["content"][1]["aside"] = text


TURNS = {"backends-agree", "tool-calls-fit-the-tools", "answers-are-read-back", "decoding-allows-answers"}
TOYS = {
    "poem": Toy(poems, set_line, "poem[1]", "poem[1]", frozenset(TURNS)),
    "aside": Toy(asides, set_aside, "messages[1].content", "messages[1].content[1].aside"),
}


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with toys_known():
        yield


@pytest.fixture(params=TOYS.values(), ids=TOYS)
def toy(request: pytest.FixtureRequest) -> Toy:
    found: Toy = request.param
    return found


@pytest.fixture
def judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Data, str]]:
    """Judges lines by `check`; returns the exit code, the report, and its page for the browser."""

    def judge(lines: list[Data], *words: str) -> tuple[int, Data, str]:
        path, page = write_lines(tmp_path / "rows.jsonl", lines), tmp_path / "page.html"
        words = ("check", str(path), "--tokenizer", TOKENIZER, "--report", str(page), "--json", *words)
        code = main([*words])
        return code, json.loads(capsys.readouterr().out), page.read_text(encoding="utf-8")

    return judge


def found_in(report: Data) -> set[tuple[str, str]]:
    """Return the rule and the place of each cause, without the file."""
    return {(cause["rule"], cause["place"].rpartition("rows.jsonl:")[2]) for cause in report["causes"]}


def shown_part(report: Data) -> str:
    """Return the part of the first record that shows a sign of its file."""
    [sign] = [cause for cause in report["causes"] if cause["rule"] == "ML636"]
    shown: str = sign["detail"].partition("rows.jsonl:3, ")[2].partition(":")[0]
    return shown


def judged_checks(report: Data) -> dict[str, str]:
    """Return the reason of each check that was not done; empty for one that was."""
    return {check["case"]: check["not_checked"] for check in report["checks"]}


def masked_eos(line: Data) -> None:
    line["labels"][-1] = -100


def without_eos(line: Data) -> None:
    del line["input_ids"][-1], line["labels"][-1]


def test_sound_records_are_judged(toy: Toy, judged: Any) -> None:
    code, report, page = judged(toy.records())
    assert (code, found_in(report)) == (0, set())
    # a conversation has no recipe whose template could differ
    reasons = {case: reason for case, reason in judged_checks(report).items() if reason}
    assert {*reasons} == toy.without_turns & judged_checks(report).keys()
    assert all("each is a poem" in reason for reason in reasons.values())
    [statistics] = [check for check in report["checks"] if check["case"] == "statistics"]
    assert statistics["facts"]["rows"] == len(toy.records())
    assert "statistics" in page


def test_faults_of_records_are_found_in_their_places(toy: Toy, judged: Any) -> None:
    records = toy.records()
    toy.set_text(records[2], f"the {WRONG} is open.")
    records.append(copy.deepcopy(records[4]))
    code, report, page = judged(records)
    assert code == 0  # both are notes
    assert found_in(report) == {("ML636", "3"), ("ML608", "9")}
    assert shown_part(report) == toy.field
    assert toy.field in page


def test_a_record_that_cannot_be_read_names_its_field(toy: Toy, judged: Any) -> None:
    records = toy.records()
    toy.set_text(records[2], 7)
    code, report, page = judged(records)
    assert (code, found_in(report)) == (1, {("ML601", f"3, {toy.value}")})
    assert toy.value in page


@pytest.mark.parametrize("alone", [False, True], ids=["with the record", "ids alone"])
def test_sound_ids_are_judged(alone: bool, toy: Toy, judged: Any) -> None:
    lines = with_ids(oracle_named(TOKENIZER), toy.records())
    code, report, _ = judged(ids_alone(lines) if alone else lines)
    assert (code, found_in(report)) == (0, set())
    [check] = [check for check in report["checks"] if check["case"] == "labels"]
    assert (check["facts"]["judged"], check["facts"]["wrong"]) == (len(lines), 0)
    assert ("read back" in check["facts"]["encoded rows of"]) is alone
    reasons = judged_checks(report)
    assert bool(reasons["decoding"]) is bool(toy.without_turns)


@pytest.mark.parametrize("alone", [False, True], ids=["with the record", "ids alone"])
def test_faults_of_ids_are_found_in_their_places(alone: bool, toy: Toy, judged: Any) -> None:
    records = toy.records()
    toy.set_text(records[2], f"the {WRONG} is open.")
    lines = with_ids(oracle_named(TOKENIZER), records)
    masked_eos(lines[1])
    without_eos(lines[5])
    code, report, page = judged(ids_alone(lines) if alone else lines)
    assert code == 1
    assert found_in(report) == {("ML546", "2"), ("ML522", "6"), ("ML636", "3")}
    assert shown_part(report) == toy.field
    assert toy.field in page


def test_ids_of_another_record_are_found(toy: Toy, judged: Any) -> None:
    lines = with_ids(oracle_named(TOKENIZER), toy.records())
    lines[3] |= {key: lines[4][key] for key in ("input_ids", "labels")}
    code, report, page = judged(lines)
    assert code == 1
    assert {place for rule, place in found_in(report) if rule in ("ML533", "ML534")} == {"4"}
    assert "rows.jsonl:4" in page


def test_packed_ids_are_judged(toy: Toy, judged: Any) -> None:
    lines = with_ids(oracle_named(TOKENIZER), toy.records())
    packed = {
        "conversations": toy.records(),
        "input_ids": [token for line in lines for token in line["input_ids"]],
        "labels": [label for line in lines for label in line["labels"]],
        "position_ids": [n for line in lines for n in range(len(line["input_ids"]))],
    }
    code, report, _ = judged([packed])
    assert (code, found_in(report)) == (0, set())
    masked = copy.deepcopy(packed)
    masked["labels"][-1] = -100
    code, report, _ = judged([masked])
    assert (code, {rule for rule, _ in found_in(report)}) == (1, {"ML546"})


def test_audit_agrees_with_check(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = with_ids(oracle_named(TOKENIZER), toy.records())
    path = write_lines(tmp_path / "rows.jsonl", lines)
    dataset = write_lines(tmp_path / "dataset.jsonl", toy.records())
    words = ("check", str(path), "--as", "encoded", "--tokenizer", TOKENIZER)
    assert main([*words]) == 0
    assert f"{len(lines)} rows: {len(lines)} sound" in capsys.readouterr().out
    # the records of the dataset are those of the lines
    write_lines(path, [{"row": number, **line} for number, line in enumerate(ids_alone(lines))][:-1])
    assert main([*words, "--dataset", str(dataset)]) == 1
    shown = capsys.readouterr().out
    assert "ML502" in shown
    assert f"{len(lines) - 1} rows: {len(lines) - 1} sound" in shown


def test_audit_names_records_without_ids(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = write_lines(tmp_path / "rows.jsonl", toy.records()[:1]), tmp_path / "page.html"
    assert main(["check", str(path), "--as", "encoded", "--tokenizer", TOKENIZER, "--report", str(page)]) == 1
    shown = capsys.readouterr().out
    assert f"ML501 {path}:1, input_ids" in shown
    assert ("this is a poem" in shown) is bool(toy.without_turns)
    assert "ML501" in page.read_text(encoding="utf-8")


def test_a_fault_is_in_the_summary_of_a_job(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    lines = with_ids(oracle_named(TOKENIZER), toy.records())
    masked_eos(lines[1])
    path = write_lines(tmp_path / "rows.jsonl", lines)
    assert main(["check", str(path), "--as", "encoded", "--tokenizer", TOKENIZER, "--output-format", "github"]) == 1
    assert "line=2,title=ML546" in capsys.readouterr().out
    assert "ML546" in summary.read_text(encoding="utf-8")
    assert "rows.jsonl:2" in summary.read_text(encoding="utf-8")


@pytest.mark.slow
def test_other_processes_judge_them(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "rows.jsonl", toy.records())
    figures = []
    for processes in ("1", "2"):
        assert main(["stats", str(path), "--tokenizer", TOKENIZER, "--processes", processes, "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0] == figures[1]
    assert figures[0]["rows"] == len(toy.records())


def test_their_figures_are_counted(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = toy.records()
    toy.set_text(records[2], f"the {WRONG} is open.")
    path = write_lines(tmp_path / "rows.jsonl", records)
    words = ("stats", str(path), "--tokenizer", TOKENIZER)
    assert main([*words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    encoded = [oracle_named(TOKENIZER).encode(record) for record in records]
    assert figures["rows"] == len(records)
    assert figures["tokens"]["total"] == sum(len(row.input_ids) for row in encoded)
    assert figures["supervised_tokens"]["total"] == sum(row.supervised_tokens for row in encoded)
    assert figures["texts"]["decoded_wrongly"] == {"rows": 1, "examples": [f"{path}:3"]}
    turns = (0, 0) if toy.without_turns else (2 * len(records), len(records))
    assert (figures["messages"], figures["assistant_turns"]) == turns
    assert figures["poems"] == (len(records) if toy.without_turns else 0)
    assert figures["rows_with_asides"] == len(records) - figures["poems"]
    assert figures["rows_with_thinking"] == 0
    assert main([*words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ("poem 8 rows, each a poem" in shown) is bool(toy.without_turns)
    assert ("tools: 0; aside: 8" in shown) is not bool(toy.without_turns)
    assert "decoded wrongly: 1, first rows.jsonl:3" in shown


def test_rows_of_several_kinds_are_counted_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for records in ([*poems(), *asides()], [*asides(), *poems()]):
        path = write_lines(tmp_path / "rows.jsonl", records)
        assert main(["stats", str(path), "--tokenizer", TOKENIZER, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert (figures["rows"], figures["rows_refused"]) == (16, 0)
        assert (figures["poems"], figures["rows_with_asides"], figures["messages"]) == (8, 8, 16)


def test_they_are_shown_with_their_tokens(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = with_ids(oracle_named(TOKENIZER), toy.records())
    masked_eos(lines[1])
    path, page = write_lines(tmp_path / "rows.jsonl", lines), tmp_path / "tokens.html"
    words = ("render", str(path), "--tokenizer", TOKENIZER, "--row", "2")
    assert main([*words]) == 0
    assert "rivers" in capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert main([*words, "--compare", "mistral-common", "--html", str(page)]) == 1  # a label differs
    assert "rivers" in page.read_text(encoding="utf-8")
    records = toy.records()
    toy.set_text(records[2], 7)
    write_lines(path, records)
    assert main(["render", str(path), "--tokenizer", TOKENIZER]) == 2
    assert f"rows.jsonl:3, {toy.value}" in capsys.readouterr().err


def test_they_are_imported(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = toy.records()
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    assert main(["import", str(path), "--to", str(rows)]) == 0
    assert [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] == records
    toy.set_text(records[2], 7)
    path.write_text(json.dumps(records), encoding="utf-8")
    rows.unlink()
    assert main(["import", str(path), "--to", str(rows)]) == 2
    assert f"records.json record 3, line 1, {toy.value}" in capsys.readouterr().err


def test_the_texts_of_chunks_are_judged_as_those_of_messages(judged: Any) -> None:
    """A row that is about a control token, or a lost letter, may spell it in a chunk, too."""
    records = asides()
    for record, question, said in zip(
        records, ("What does the token [INST] mean?", "What is U+FFFD?"), ("[INST] opens", "it is \ufffd"), strict=False
    ):
        record["messages"][0]["content"][0]["text"] = question
        set_aside(record, said)
    assert found_in(judged(records)[1]) == set()
    set_aside(records[4], "[INST] opens")
    set_aside(records[5], "it is \ufffd")
    assert found_in(judged(records)[1]) == {("ML612", "5"), ("ML617", "6")}


def test_white_space_around_chunks_is_that_of_texts(judged: Any) -> None:
    records = [asides()[0] for _ in range(40)]
    for number, record in enumerate(records):
        for message in record["messages"]:
            message["content"] = [{"type": "text", "text": f" number {number}"}]
    assert "ML661" in {rule for rule, _ in found_in(judged(records)[1])}


CONFTEST = """
from pytest_mistral_lora.chat.chunks.registry import register_types
from pytest_mistral_lora.chat.kinds.registry import register_kinds

register_kinds(["toy_kind:POEM"])
register_types(["toy_chunk:ASIDE"])
"""
SCRIPT = """
from pytest_mistral_lora.chat.chunks.registry import register_types
from pytest_mistral_lora.chat.kinds.registry import register_kinds
from pytest_mistral_lora.cli import main

if __name__ == "__main__":
    register_kinds(["toy_kind:POEM"])
    register_types(["toy_chunk:ASIDE"])
    raise SystemExit(main())
"""


def test_a_conftest_makes_them_known_to_the_suite(toy: Toy, pytester: pytest.Pytester) -> None:
    KINDS.pop(POEM.name)
    chunk_types().pop(ASIDE.name)
    pytester.makeconftest(CONFTEST)
    rows = write_lines(pytester.path / "rows.jsonl", toy.records())
    words = ("--mistral-golden", "--mistral-dataset", str(rows), "--mistral-tokenizer", TOKENIZER)
    result = pytester.runpytest_inprocess(*words, "-k", "dataset and statistics")
    result.assert_outcomes(passed=1, deselected=len(result.reprec.getcalls("pytest_deselected")[0].items))
    result.stdout.fnmatch_lines([f"*{len(toy.records())} rows*"])


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_script_makes_them_known_to_each_process(processes: str, toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "verbs.py").write_text(SCRIPT)
    write_lines(tmp_path / "rows.jsonl", toy.records())
    words = ("stats", "rows.jsonl", "--tokenizer", TOKENIZER, "--json", "--processes", processes)
    command = [sys.executable, "verbs.py", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(toy_kind.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == len(toy.records())


def test_their_goldens_are_recorded_and_judged(toy: Toy, tmp_path: Path) -> None:
    row = parse_trained(toy.records()[0])
    tokenizer = CheckpointTokenizer(oracle_named(TOKENIZER).path)
    case = goldens.Case(name="row", description="A row.", row=row, versions=frozenset({tokenizer.oracle.facts}))
    golden = goldens.record(case, tokenizer, tmp_path)
    data = json.loads(golden.text())
    assert goldens.violations(data, "row") == []
    assert data["row"] == toy.records()[0]
    data["spans"][-1]["role"] = "singer"
    [violation, *_] = goldens.violations(data, "row")
    assert "singer" in str(violation)
    data = json.loads(golden.text())
    toy.set_text(data["row"], 7)
    assert toy.value in str(goldens.violations(data, "row")[0])
