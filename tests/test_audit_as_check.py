"""Encoded rows in `mistral-lora check`: one verdict in every format, and `audit` is a second name of the verb."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora import audit
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main

Lines = list[Any]
Found = set[tuple[str, str]]


def _encoded() -> Lines:
    oracle, lines = Oracle(shipped_tokenizer("spm-v3")), []
    for number in range(4):
        row = {
            "messages": [
                {"role": "user", "content": f"Add 1 to {number}."},
                {"role": "assistant", "content": f"{number + 1}"},
            ]
        }
        encoded = oracle.encode(row)
        labels = list(encoded.labels or ())
        lines.append({"row": number, **row, "input_ids": list(encoded.input_ids), "labels": labels})
    return lines


def _text(lines: Lines) -> str:
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)


def _changed(change: Callable[[Lines], Lines]) -> Callable[[Path, Lines], Path]:
    def write(folder: Path, lines: Lines) -> Path:
        file = folder / "rows.jsonl"
        file.write_text(_text(change(lines)))
        return file

    return write


def _masked(line: Any) -> Any:
    return {**line, "labels": [*line["labels"][:-1], -100]}


def _without(*keys: str) -> Callable[[Lines], Lines]:
    return lambda lines: [{key: value for key, value in line.items() if key not in keys} for line in lines]


def _sharegpt(lines: Lines) -> Lines:
    return [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No."}]} for _ in lines]


def _cut_gzip(folder: Path, lines: Lines) -> Path:
    file, data = folder / "rows.jsonl.gz", gzip.compress(_text(lines).encode())
    file.write_bytes(data[: len(data) // 2])
    return file


def _folder_without_data(folder: Path, lines: Lines) -> Path:
    (folder / "rows").mkdir()
    (folder / "rows" / "readme.txt").write_text("later")
    return folder / "rows"


def _two_files(folder: Path, lines: Lines) -> Path:
    (folder / "rows").mkdir()
    for name, part in (("a", lines[:2]), ("b", [_masked(lines[2]), "{"])):
        (folder / "rows" / f"{name}.jsonl").write_text(_text(part))
    return folder / "rows"


CORPUS: dict[str, tuple[Callable[[Path, Lines], Path], int, set[str]]] = {
    "sound": (_changed(lambda lines: lines), 0, set()),
    "ids-alone": (_changed(_without("messages", "row")), 0, set()),
    "empty": (_changed(lambda lines: []), 2, set()),
    "blank-lines": (_changed(lambda lines: ["", ""]), 2, set()),
    "not-json": (_changed(lambda lines: ["hello", "world"]), 2, set()),
    "one-bad-line": (_changed(lambda lines: [lines[0], "{", *lines[2:]]), 1, {"ML501"}),
    "first-line-bad": (_changed(lambda lines: ["{", *lines[1:]]), 1, {"ML501"}),
    "masked-eos": (_changed(lambda lines: [*map(_masked, lines)]), 1, {"ML546"}),
    "bad-line-and-masked-eos": (_changed(lambda lines: [_masked(lines[0]), "{", *lines[2:]]), 1, {"ML501", "ML546"}),
    "no-labels": (_changed(_without("labels")), 1, {"ML501"}),
    "ids-of-text": (_changed(lambda lines: [{**line, "input_ids": "1 2"} for line in lines]), 1, {"ML501"}),
    "refused-rows": (_changed(lambda lines: [{**lines[0], "messages": lines[0]["messages"][1:]}]), 1, {"ML507"}),
    "cut-gzip": (_cut_gzip, 2, set()),
    "folder-without-data": (_folder_without_data, 2, set()),
    "folder-with-one-bad-file": (_two_files, 1, {"ML501", "ML546"}),
    "missing": (lambda folder, lines: folder / "none.jsonl", 2, set()),
}
"""How a file is written, the exit code, and the rules that it breaks."""
OTHER_KINDS: dict[str, tuple[Callable[[Path, Lines], Path], int, set[str]]] = {
    "sharegpt": (_changed(_sharegpt), 1, {"ML501"}),
    "chat-rows": (_changed(_without("input_ids", "labels", "row")), 1, {"ML501"}),
}
"""Files that `check` recognises as chat rows: it judges them as encoded rows with `--as encoded`."""


def _found(output_format: str, out: str) -> Found:
    """Return rule and severity of each finding in an output."""
    if output_format == "github":
        kinds = {"error": "error", "notice": "note"}
        return {(rule, kinds[kind]) for kind, rule in re.findall(r"^::(error|notice) .*title=(ML\d{3}) ", out, re.M)}
    if output_format == "json":
        lines = [json.loads(line) for line in out.splitlines()] if out.startswith('{"') else [json.loads(out)]
        found = [line for line in lines if "rule" in line] or lines[0].get("causes", [])
        return {(finding["rule"], finding["severity"]) for finding in found}
    blocks = re.findall(r"^(.*)\n(ML\d{3}) ", out.replace("\nrule  ", "\n\n\n"), re.M)
    return {(rule, "note" if heading.split(":")[0] == "note" or heading.endswith(" note") else "error")
            for heading, rule in blocks if heading}  # fmt: skip


@pytest.mark.parametrize("output_format", ["text", "json", "github"])
@pytest.mark.parametrize("name", [*CORPUS, *OTHER_KINDS])
def test_audit_and_check_have_one_verdict(
    name: str, output_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoded_lines: Lines
) -> None:
    write, code, rules = (CORPUS | OTHER_KINDS)[name]
    path = str(write(tmp_path, encoded_lines))
    kind = ["--as", "encoded"] if name in OTHER_KINDS else []
    words = [path, "--tokenizer", "spm-v3", "--output-format", output_format, *kind]
    assert main(["audit", *words]) == code
    audited = capsys.readouterr()
    assert main(["check", *words, "--no-cache"]) == code
    checked = capsys.readouterr()
    if code == 2:
        assert (audited.out, checked.out) == ("", "")
        assert audited.err == checked.err
        return
    assert _found(output_format, audited.out) == _found(output_format, checked.out)
    assert {rule for rule, _ in _found(output_format, audited.out)} == rules


@pytest.mark.parametrize("name", [name for name, (_, code, _) in CORPUS.items() if code < 2])
def test_the_python_interface_has_this_verdict_too(name: str, tmp_path: Path, encoded_lines: Lines) -> None:
    write, code, rules = CORPUS[name]
    verdict = audit(write(tmp_path, encoded_lines), tokenizer="spm-v3")
    assert verdict.ok is (code == 0)
    assert {finding.rule for finding in verdict.findings} == rules


def test_known_deviations_count_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str], encoded_lines: Lines) -> None:
    path = str(CORPUS["bad-line-and-masked-eos"][0](tmp_path, encoded_lines))
    known = tmp_path / "known.txt"
    assert main(["audit", path, "--tokenizer", "spm-v3", "--write-xfails", str(known)]) == 1
    entries = [line for line in known.read_text().splitlines() if line and not line.startswith("#")]
    assert entries == [f"mistral-golden::rows.jsonl::encoded::{case}  # " for case in ("file", "labels")]
    known.write_text("".join(f"{entry} ours\n" for entry in entries))
    words = [path, "--tokenizer", "spm-v3", "--xfails", str(known)]
    capsys.readouterr()
    assert main(["audit", *words, "--output-format=jsonl"]) == 0
    [summary] = capsys.readouterr().out.splitlines()
    assert [xfail["reason"] for xfail in json.loads(summary)["summary"]["known"]] == ["ours", "ours"]
    for verb in (["audit"], ["check", "--no-cache"]):
        assert main([*verb, *words]) == 0
    Path(path).write_text(_text(encoded_lines))
    for verb in (["audit"], ["check", "--no-cache"]):
        capsys.readouterr()
        assert main([*verb, *words]) == 1
        assert capsys.readouterr().err.count("matches no finding") == 2


def test_a_report_of_an_audit_is_that_of_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoded_lines: Lines
) -> None:
    path = str(CORPUS["bad-line-and-masked-eos"][0](tmp_path, encoded_lines))
    reports = []
    for verb in ("audit", "check"):
        assert main([verb, path, "--tokenizer", "spm-v3", "--report", str(tmp_path / f"{verb}.json")]) == 1
        data = json.loads((tmp_path / f"{verb}.json").read_text())
        checks = [(check["nodeid"], check["outcome"], len(check["findings"])) for check in data["checks"]]
        causes = [(cause["rule"], cause["place"], cause["count"], cause["check"]) for cause in data["causes"]]
        reports.append((checks, causes, data["counts"], data["verdict"], data["exit_status"]))
    assert reports[0] == reports[1]
    assert capsys.readouterr().out.count("next: mistral-lora rules ML501") == 2


def test_every_row_of_a_long_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoded_lines: Lines
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(_text([{**_masked(encoded_lines[0]), "row": number} for number in range(50)]))
    assert main(["audit", str(file), "--tokenizer", "spm-v3"]) == 1
    assert f"and 49 more like it: {file}:2-50" in " ".join(capsys.readouterr().out.split())
    assert main(["audit", str(file), "--tokenizer", "spm-v3", "--output-format=jsonl"]) == 1
    *lines, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["index"] for line in lines if line["rule"] == "ML546"] == [*range(50)]


@pytest.fixture(scope="module")
def encoded_lines() -> Lines:
    return _encoded()
