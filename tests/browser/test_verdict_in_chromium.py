"""A verdict in a notebook: its report, in a frame of the output cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from faulty_encodings import all_trained_on, as_it_is, encoded_lines, question_rows
from pages import NARROW, WIDE, OpenPage, open_every_part, sideways_scroll

from pytest_mistral_lora import audit

if TYPE_CHECKING:
    from playwright.sync_api import Frame, Page

FaultsOf = Callable[["Page | Frame"], list[str]]
NOTEBOOK = """<!DOCTYPE html>
<html lang="en">
<title>A notebook</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ margin: 0; font-family: sans-serif; color: CanvasText; background: Canvas; }}
  main {{ display: flex; flex-wrap: wrap; }}
  h1 {{ flex: 1 0 100%; }}
  .prompt {{ flex: 0 0 4em; }}
  .output {{ flex: 1 1 0; min-width: 0; overflow: auto; }}
</style>
<main>
  <h1>Notebook</h1>
  <div class="prompt">Out[1]:</div>
  <div class="output">{output}</div>
</main>
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page like a notebook's, whose output cell has the verdict on a sound row and a wrong one."""
    lines = encoded_lines(question_rows(("Capital of France?", "unbroken" * 60)), (as_it_is, all_trained_on))
    verdict = audit(list(lines), tokenizer="spm-v3")
    assert [finding.rule for finding in verdict.findings] == ["ML543"]
    file = tmp_path_factory.mktemp("notebook") / "notebook.html"
    file.write_text(NOTEBOOK.format(output=verdict._repr_html_()), encoding="utf-8")
    return file


def report_in(page: Page) -> Frame:
    frame = page.locator(".output iframe").element_handle().content_frame()
    frame.wait_for_selector(".cause")
    return frame


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_everybody_can_read_the_verdict_in_its_cell(
    notebook: Path,
    width: int,
    scheme: str,
    open_page: OpenPage,
    accessibility_faults: Callable[[Page | Frame], list[str]],
) -> None:
    page = open_page(notebook, width=width, scheme=scheme)
    assert sideways_scroll(page) == 0
    report = report_in(page)
    open_every_part(report)
    assert sideways_scroll(report) == 0
    assert accessibility_faults(page) == []
    assert accessibility_faults(report) == []


def test_the_frame_keeps_to_its_cell(notebook: Path, open_page: OpenPage) -> None:
    page = open_page(notebook)
    frame, cell = (page.locator(name).bounding_box() for name in (".output iframe", ".output"))
    assert frame is not None
    assert cell is not None
    assert frame["width"] <= cell["width"]
    assert 300 < frame["height"] < 900
    report = report_in(page)
    assert "ML543" in report.locator(".cause").first.inner_text()
    # neither the notebook's text nor its colours change
    assert page.locator(".prompt").evaluate("cell => getComputedStyle(cell).fontFamily") == "sans-serif"
    with pytest.raises(Exception, match=r"cross-origin"):
        report.evaluate("parent.document.title")


def test_the_report_follows_the_colours_of_the_browser(notebook: Path, open_page: OpenPage) -> None:
    colours = {
        report_in(open_page(notebook, scheme=scheme)).evaluate("getComputedStyle(document.body).color")
        for scheme in ("light", "dark")
    }
    assert len(colours) == 2
