from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from faulty_encodings import all_trained_on, encoded_lines, question_rows, without_a_token, without_bos
from judged_samples import HOSTILE

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.groups import group_findings
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.report import RunFacts, report_data, write_report
from pytest_mistral_lora.report.pages import html_page, rule_url

SCHEMA = json.loads(files("pytest_mistral_lora.report").joinpath("report.schema.json").read_text(encoding="utf-8"))
SECRET = "s3cr3t-value"


@pytest.fixture(scope="module")
def files_at_fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, encoded rows with a token too few and with all labels, in a Git repository."""
    folder = tmp_path_factory.mktemp("report")
    rows = question_rows(("<b>Capital</b> of France?", f"My key is {SECRET}.", "Why?"))
    lines = encoded_lines(rows, (without_a_token, without_bos, all_trained_on))
    (folder / "encoded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-q", "-m", "rows")
    for command in (("init", "-q"), ("add", "."), words):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def written(files_at_fault: Path) -> Path:
    """The folder with the reports of a check."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files_at_fault)
        patch.setenv("MY_API_KEY", SECRET)
        words = ("encoded.jsonl", "--tokenizer", "spm-v3", "--report", "out.json", "--report", "out.html")
        assert main(["check", *words]) == 1
    return files_at_fault


@pytest.fixture
def report(written: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((written / "out.json").read_text(encoding="utf-8"))
    return data


def test_a_report_keeps_its_schema(report: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())
    validator.validate(report)
    assert any(cause["tokens"] for cause in report["causes"])

    def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        data = copy.deepcopy(report)
        change(data)
        return data

    changes: tuple[Callable[[dict[str, Any]], object], ...] = (
        lambda data: data.pop("command"),
        lambda data: data.update(new=1),
        lambda data: data["checks"][0].update(outcome="green"),
        lambda data: data["causes"][0].update(rule="X1"),
        lambda data: data["causes"][0].update(tokens={"title": "x", "sides": ["a"], "columns": [[[["0"]], "?"]]}),
    )
    for change in changes:
        assert not validator.is_valid(broken(change))


def test_a_report_names_what_made_it(report: dict[str, Any]) -> None:
    assert report["command"].startswith("mistral-lora check encoded.jsonl --tokenizer spm-v3 ")
    assert report["code"] == {"commit": report["code"]["commit"], "dirty": False}
    assert datetime.fromisoformat(report["started"]).tzinfo is not None
    assert report["seconds"] > 0
    for cause in report["causes"]:
        # the same without the files that it writes
        assert cause["commands"]["rerun"] == "mistral-lora check encoded.jsonl --tokenizer spm-v3"
        assert cause["commands"]["explain"] == f"mistral-lora rules {cause['rule']}"


def test_a_secret_is_in_none_of_the_files(written: Path) -> None:
    for name in ("out.json", "out.html", "out.rows.html"):
        text = (written / name).read_text(encoding="utf-8")
        assert SECRET not in text
        # its tokens would spell it
        assert "␣My" not in text
        assert "▁My" not in text
    assert "My key is ***." in (written / "out.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["github", "json"])
def test_a_secret_is_in_no_format(
    form: str, written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(written)
    monkeypatch.setenv("MY_API_KEY", SECRET)
    summary = written / f"{form}.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert main(["check", "encoded.jsonl", "--tokenizer", "spm-v3", "--output-format", form]) == 1
    out = capsys.readouterr().out + (summary.read_text() if summary.exists() else "")
    assert SECRET not in out
    assert "␣My" not in out
    assert "ML5" in out


def test_the_failed_rows_are_beside_the_report(written: Path) -> None:
    assert 'href="out.rows.html"' in (written / "out.html").read_text(encoding="utf-8")
    rows = (written / "out.rows.html").read_text(encoding="utf-8")
    assert "encoded.jsonl:1" in rows
    assert "encoded.jsonl:3" in rows
    # the judged tokens below mistral-common's
    assert "tk-pair" in rows
    assert "tk-wrong" in rows


def test_rows_of_an_earlier_report_do_not_stay(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(written / "out.rows.html", tmp_path)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["check", "rows.jsonl", "--tokenizer", "spm-v3", "--report", "out.html"]) == 0
    assert {one.name for one in tmp_path.iterdir()} == {"rows.jsonl", "out.html"}
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "No findings" in page


def test_a_report_that_cannot_be_written_is_refused_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, found in (("x.txt", "expected a name that ends in"), ("nope/x.html", "no such folder")):
        with pytest.raises(SystemExit, match="2"):
            main(["check", "--report", str(tmp_path / name)])
        assert found in capsys.readouterr().err


def test_a_report_of_markdown_has_each_fix_whole_and_replaces_no_other_file(
    report: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "x.md"
    for cause in report["causes"]:
        cause["fix"] = f"{cause['fix']} {'x' * 1000} end"
    for _ in range(2):
        write_report(file, report)
        text = file.read_text(encoding="utf-8")
        assert [text.count(f"### ❌ {cause['rule']}: {cause['fault']}") for cause in report["causes"]] == [1, 1, 1]
        assert all(f"fix: {cause['fix']}" in text for cause in report["causes"])
    file.write_text("mine")
    with pytest.raises(InputError):
        write_report(file, report)


def test_the_title_names_project_and_target_and_the_first_finding_comes_before_the_run(report: dict[str, Any]) -> None:
    page = html_page({**report, "project": "my-project"})
    assert "<title>my-project / encoded.jsonl: " in page
    # the facts of the run are folded
    assert page.index("<details>\n<summary>The run") < page.index("<dt>versions") < page.index("</details>")


@pytest.mark.parametrize("name", ["x.html", "x.json", "x.md"])
def test_a_report_for_which_there_is_no_room_is_an_error_and_leaves_nothing(
    name: str, report: dict[str, Any], tmp_path: Path
) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written: File too large"):
            write_report(tmp_path / name, report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


class _Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        for name, value in attrs:
            self.ids += [value or ""] if name == "id" else []
            self.links += [value[1:]] if name == "href" and value and value.startswith("#") else []


def _page(*findings: Finding) -> str:
    outcome = CheckOutcome(HOSTILE, "mask", "c", "failed", findings, commands={"rerun": HOSTILE})
    causes = [one.to_json() for one in group_findings([outcome])]
    run = RunFacts(HOSTILE, datetime.now(UTC), 1.0, None)
    counts = {"deselected": 0, "not_run": 0}
    texts = {"verdict": HOSTILE, "known_faults": [HOSTILE]}
    return html_page(report_data([outcome.to_json()], 1, run, causes=causes, **counts, **texts))


def test_text_of_rows_is_text(report: dict[str, Any]) -> None:
    page = _page(Finding("ML004", HOSTILE, Place.of(HOSTILE), HOSTILE, HOSTILE, HOSTILE, HOSTILE))
    assert _Elements(page).names.count("script") == 1
    assert "&lt;script&gt;" in page
    # nor is there a character that turns the page around, or that no page may have
    assert not re.search("[\x00\x1b\u2028\ud800-\udfff]", page)
    assert "<b>Capital" not in html_page(report)


def test_code_in_the_words_of_a_finding_is_code() -> None:
    page = _page(Finding("ML521", "x", expected="`<b>`"))
    assert "<code>add_special_tokens=False</code>" in page
    assert "<code>&lt;b&gt;</code>" in page


def test_every_link_in_the_page_leads_somewhere(written: Path) -> None:
    elements = _Elements((written / "out.html").read_text(encoding="utf-8"))
    assert set(elements.links) <= set(elements.ids)
    assert len(elements.ids) == len(set(elements.ids))
    assert {link for link in elements.links if link.startswith("rule-")}


def test_a_rule_leads_to_its_page_if_the_package_names_its_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    from email.message import Message

    from pytest_mistral_lora.report import pages

    named = Message()
    named["Project-URL"] = "Documentation, https://docs.example.org/lora/"
    monkeypatch.setattr(pages, "metadata", lambda name: named)
    rule_url.cache_clear()
    assert rule_url("ML601") == "https://docs.example.org/lora/rules/ML601/"
    assert 'href="https://docs.example.org/lora/rules/ML004/"' in _page(Finding("ML004", "x"))
    rule_url.cache_clear()
