from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from judged_samples import HOSTILE, judged, write_file

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.report.judged import junit_text


def test_each_case_is_a_test_with_rule_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path)
    third, fourth = (Place.of("rows.jsonl", record) for record in (3, 4))
    found = [Finding("ML601", "'bot'", third), Finding("ML601", "x", fourth), Finding("ML428", "y")]
    [suite] = ElementTree.fromstring(junit_text(judged(*found)))
    assert {name: suite.get(name) for name in ("name", "tests", "failures", "errors", "skipped")} == {
        "name": "mistral-lora check",
        "tests": "3",
        "failures": "1",
        "errors": "0",
        "skipped": "1",
    }
    failed, passed, skipped = suite
    assert dict(failed.attrib) == {
        "classname": "mistral-golden.spm-v3.dataset",
        "name": "rows",
        "file": "rows.jsonl",
        "line": "3",
        "time": "0.250",
    }
    properties = [(one.get("name"), one.get("value")) for one in failed.iter("property")]
    assert properties == [("rule", "ML601"), ("file", "rows.jsonl"), ("line", "3"), ("rule", "ML428")]
    [failure] = failed.iter("failure")
    assert (failure.get("type"), failure.get("message")) == ("ML601", "ML601 rows.jsonl:3: 'bot'")
    assert "ML428 y" in str(failure.text)
    assert list(passed) == []
    assert [(one.tag, one.get("message")) for one in skipped] == [("skipped", "no CUDA device")]


def test_hostile_text_is_text() -> None:
    text = junit_text(judged(Finding("ML601", HOSTILE)))
    root = ElementTree.fromstring(text.encode())
    [failure] = root.iter("failure")
    shown = str(failure.text)
    assert "`````\\x1b[31m\\x00\\ud800 <script>|**" in shown
    assert {one.tag for one in root.iter()} == {
        "testsuites", "testsuite", "testcase", "properties", "property", "failure", "skipped",
    }  # fmt: skip
