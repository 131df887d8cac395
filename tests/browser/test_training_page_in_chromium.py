from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pages import NARROW, WIDE, OpenPage, open_every_part, sideways_scroll

from pytest_mistral_lora.training.curves import training_page
from pytest_mistral_lora.training.generate.record import AnsweredRow

if TYPE_CHECKING:
    from playwright.sync_api import Page

STEPS = 300


@pytest.fixture(scope="module")
def training_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with every curve, a name that is HTML, and numbers in the table of very different sizes."""
    log: list[dict[str, Any]] = [{"step": 0, "eval_loss": 12.0}]
    for step in range(1, STEPS + 1):
        log.append({"step": step, "loss": 12 / step, "grad_norm": 1e3 / step, "learning_rate": 1e-9 * step})
        if step % 100 == 0:
            rates = {f"eval_format/json_schema:{'long' * 9}{n}.json": step / STEPS for n in range(7)}
            log += [{"step": step, **rates}, {"step": step, "eval_loss": 10 / step}]
    file = tmp_path_factory.mktemp("training") / "training.html"
    facts = {"base": "<img src=x onerror=alert(1)>, " + "unbroken" * 40, "rows": "1 to train on"}
    checks = {"regex": "unbroken" * 40}
    answer = {"step": 1, "row": 0, "text": "the " * 2000, "stop": "length", "equal": False, "checks": checks}
    last = {**answer, "step": STEPS, "text": "unbroken" * 40, "equal": True}
    answered = [AnsweredRow("Which one?\n" * 60, "This.", [answer, last]) for _ in range(3)]
    file.write_text(training_page(log, STEPS, facts, answered), encoding="utf-8")
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_everybody_can_read_the_curves(
    training_file: Path, width: int, scheme: str, open_page: OpenPage, accessibility_faults: Callable[[Page], list[str]]
) -> None:
    page = open_page(training_file, width=width, scheme=scheme)
    open_every_part(page)
    assert sideways_scroll(page) == 0
    assert accessibility_faults(page) == []


def test_curves_are_drawn_over_the_whole_width_and_have_words(training_file: Path, open_page: OpenPage) -> None:
    page = open_page(training_file, width=NARROW, script=False)
    images = page.get_by_role("img").all()
    assert len(images) == 4
    names = [image.get_attribute("aria-label") or "" for image in images]
    assert names[0].startswith("Loss by step. training: first 12, last 0.04, lowest 0.04, highest 12; held-out rows: ")
    for image in images:
        plot, curve = image.bounding_box(), image.locator("path.curve").first.bounding_box()
        assert plot
        assert curve
        assert 0.6 * plot["width"] < curve["width"] <= plot["width"] + 12  # the box has the mitres, too
        assert plot["y"] - 4 <= curve["y"] <= plot["y"] + plot["height"]


def test_the_table_scrolls_by_the_keyboard(training_file: Path, open_page: OpenPage) -> None:
    page = open_page(training_file, width=NARROW)
    page.get_by_text("Numbers", exact=True).focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    table = page.get_by_role("region", name="Numbers")
    page.keyboard.press("End")
    page.wait_for_function("document.querySelector('.scroll').scrollTop > 100")
    assert table.is_visible()
