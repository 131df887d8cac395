"""A headless Chromium, and the pages that tests open in it: `tox run -e browser`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from pages import WIDE, OpenPage

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Scheme = Literal["light", "dark"]
_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        if item.path.parent == folder:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A Chromium of this machine: `MISTRAL_LORA_CHROMIUM`, or the first in PATH."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("MISTRAL_LORA_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("Chromium is missing: install it (Debian: apt-get install chromium), or set MISTRAL_LORA_CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=[*_ARGUMENTS])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[OpenPage]:
    """Opens a file at a width and in a colour scheme; at the end, no page has logged an error or loaded anything."""
    wrong: list[str] = []
    contexts = []

    def opened(
        file: Path, *, width: int = WIDE, scheme: Literal["light", "dark"] = "light", script: bool = True
    ) -> Page:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    # the favicon is a request of the browser's own, which the policy of a page refuses without a word
    assert wrong == []


@pytest.fixture(scope="session")
def accessibility_faults() -> Callable[[Page], list[str]]:
    """Gives the faults that axe finds in a page, each with its rule and its element."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is missing: pip install axe-playwright-python"
    ).Axe()

    def faults(page: Page) -> list[str]:
        # axe cannot see what the browser does not lay out
        page.add_style_tag(content="* { content-visibility: visible !important; }")
        response = axe.run(page).response
        # a page that axe could not look at has no faults either
        assert any(rule["id"] == "color-contrast" for rule in response["passes"])
        return [f"{rule['id']}: {node['html'][:200]}" for rule in response["violations"] for node in rule["nodes"]]

    return faults
