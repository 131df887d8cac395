"""The site of docs/ in a browser: everybody can read its pages, wide and narrow, in both colour schemes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pages import NARROW, WIDE, sideways_scroll

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parents[2]
PAGES = ("index.html", "symptoms/index.html", "rules/index.html", "red/index.html")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `tox run -e docs` builds it."""
    for module in ("material", "mkdocstrings"):
        pytest.importorskip(module, reason="the site is built by mkdocs-material: tox run -e browser")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_everybody_can_read_the_site(
    site: Path, chromium: Browser, width: int, scheme: str, accessibility_faults: Callable[[Page], list[str]]
) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    faults = {}
    for name in PAGES:
        page.goto((site / name).as_uri())
        assert sideways_scroll(page) == 0
        faults[name] = accessibility_faults(page)
    context.close()
    assert {name: found for name, found in faults.items() if found} == {}


def test_the_rules_are_found_by_words(site: Path, chromium: Browser) -> None:
    page = chromium.new_page()
    page.goto((site / "rules" / "index.html").as_uri() + "?find=masked%20eos")
    found = page.locator("tbody tr:visible")
    assert 0 < found.count() < 20
    assert "ML546" in " ".join(found.all_inner_texts())
    page.close()
