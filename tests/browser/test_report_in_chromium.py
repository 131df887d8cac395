from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from faulty_encodings import all_trained_on, as_it_is, encoded_lines, question_rows, without_a_token
from pages import NARROW, WIDE, OpenPage, open_every_part, sideways_scroll

from pytest_mistral_lora.cli import main

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed here").expect

if TYPE_CHECKING:
    from playwright.sync_api import Page

LONG = "<img src=x onerror=alert(1)> " + "unbroken" * 60


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on rows of which one has a role that does not exist, and on encoded rows with two faults."""
    folder = tmp_path_factory.mktemp("report")
    rows = question_rows(("Capital of France?", LONG, "Why?"))
    lines = encoded_lines(rows, (as_it_is, without_a_token, all_trained_on))
    bad = {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": LONG}]}
    for name, data in (("encoded.jsonl", lines), ("rows.jsonl", [*rows, bad])):
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in data))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["check", "encoded.jsonl", "rows.jsonl", "--tokenizer", "spm-v3", "--report", "report.html"]) == 1
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_everybody_can_read_the_report(
    report_file: Path, width: int, scheme: str, open_page: OpenPage, accessibility_faults: Callable[[Page], list[str]]
) -> None:
    page = open_page(report_file, width=width, scheme=scheme)
    open_every_part(page)
    assert sideways_scroll(page) == 0
    assert accessibility_faults(page) == []


def _shown(page: Page, kind: str) -> list[str]:
    return [one.inner_text() for one in page.locator(f".{kind}").all() if not one.evaluate("one => one.hidden")]


def test_findings_are_searched_and_filtered_by_the_keyboard(report_file: Path, open_page: OpenPage) -> None:
    page = open_page(report_file)
    everything = len(_shown(page, "cause"))
    assert everything == 3
    failed, *others = page.locator("details[data-checks]").all()
    assert failed.evaluate("one => one.open"), "checks that failed are open before anybody filters"
    assert not any(one.evaluate("one => one.open") for one in others)
    status = page.get_by_role("status")
    assert f"{everything} of {everything} findings" in status.inner_text()
    # the link to the findings, the button that copies the command, the link to the rows, and then the form
    search = page.get_by_role("searchbox", name="search")
    for _ in range(10):
        page.keyboard.press("Tab")
        if search.evaluate("one => one === document.activeElement"):
            break
    page.keyboard.type("every TOKEN trained")
    [found] = _shown(page, "cause")
    assert "ML543" in found
    assert f"1 of {everything} findings" in status.inner_text()
    search.fill("")
    expect(page.locator(".cause:not([hidden])")).to_have_count(everything)
    page.keyboard.press("Tab")
    page.keyboard.type("ML601")
    [found] = _shown(page, "cause")
    assert "'bot'" in found
    page.get_by_role("button", name="Clear").press("Enter")
    expect(page.locator(".cause:not([hidden])")).to_have_count(everything)
    page.get_by_role("combobox", name="target").select_option(label="encoded.jsonl")
    assert len(_shown(page, "cause")) == 2
    page.get_by_role("combobox", name="outcome").select_option(label="passed")
    assert _shown(page, "cause") == []
    checks = _shown(page, "check")
    assert checks
    assert all(one.startswith("passed encoded.jsonl") for one in checks)


def test_a_command_is_copied_by_a_button(report_file: Path, open_page: OpenPage) -> None:
    page = open_page(report_file)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button = page.get_by_role("button", name="Copy the command: the whole run")
    button.press("Enter")
    expect(page.locator("#shown")).to_have_text(re.compile("^Copied: mistral-lora check "))
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "mistral-lora check encoded.jsonl rows.jsonl --tokenizer spm-v3 --report report.html"


def test_the_report_is_whole_without_its_script(report_file: Path, open_page: OpenPage) -> None:
    page = open_page(report_file, script=False)
    assert page.locator(".cause").count() == 3
    assert page.locator(".tk-pair").count() == 2
    # nothing is offered that needs the script
    assert not page.locator("form").is_visible()
    assert page.locator("button[data-copy]:visible").count() == 0
    assert page.locator(".tk-wrong").first.is_visible()
