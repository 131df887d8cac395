from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pages import NARROW, WIDE, OpenPage, sideways_scroll

from pytest_mistral_lora.chat.diff import TokenDiff, TokenSide
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.token_rows import TokenRow
from pytest_mistral_lora.report.pages import tokens_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

HOSTILE = "<script>document.title = 'broken'</script><img src=x onerror=alert(1)> \u202eevil \x00 \x1b[31m שלום"
MESSAGES = [
    {"role": "user", "content": "What is the capital of France?\nOne word."},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": HOSTILE},
    {"role": "assistant", "content": "Rome.\nIt is old."},
]
SECONDS = 10.0
"""More than a page of 10,000 tokens takes on a slow machine; it takes less than a second on a laptop."""


@pytest.fixture(scope="module")
def sides() -> tuple[TokenSide, TokenSide]:
    return tuple(_side(name, MESSAGES) for name in ("spm-v3", "tekken-240911"))


@pytest.fixture(scope="module")
def page_file(sides: tuple[TokenSide, TokenSide], tmp_path_factory: pytest.TempPathFactory) -> Path:
    without_eos = sides[0]._replace(ids=sides[0].ids[:-1], labels=None)
    rows = [
        TokenRow.single("rows.jsonl:1", sides[0]),
        TokenRow.compared("rows.jsonl:2 <b>", TokenDiff(sides[0], without_eos)),
        TokenRow.compared("rows.jsonl:3", TokenDiff(*sides, same_vocabulary=False)),
    ]
    return _written(tmp_path_factory.mktemp("page") / "rows.html", rows)


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row of two turns with 10,000 tokens."""
    words = ("the", "quick", "brown", "fox", "jumps", "over", "1234", "lazy", "dogs")
    answer = " ".join(words[n * n % len(words)] for n in range(8_500))
    side = _side("spm-v3", [MESSAGES[0], {"role": "assistant", "content": answer}])
    assert len(side.ids) > 10_000
    return _written(tmp_path_factory.mktemp("long") / "rows.html", [TokenRow.single("rows.jsonl:1", side)])


def _side(name: str, messages: list[dict[str, str]]) -> TokenSide:
    oracle = Oracle(shipped_tokenizer(name))
    return TokenSide.of(name, oracle.encode({"messages": messages}), oracle.piece)


def _written(path: Path, rows: list[TokenRow]) -> Path:
    path.write_text(tokens_page(rows, heading="Tokens of rows.jsonl"), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_everybody_can_read_the_page(
    page_file: Path, width: int, scheme: str, open_page: OpenPage, accessibility_faults: Callable[[Page], list[str]]
) -> None:
    page = open_page(page_file, width=width, scheme=scheme)
    assert sideways_scroll(page) == 0
    assert accessibility_faults(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_faint_colour_and_a_nameless_list_are_faults(
    page_file: Path, scheme: str, open_page: OpenPage, accessibility_faults: Callable[[Page], list[str]]
) -> None:
    page = open_page(page_file, scheme=scheme)
    page.evaluate("document.querySelector('.tk-cell').style.color = 'gray'")
    page.evaluate("document.querySelector('.tk-list').removeAttribute('aria-labelledby')")
    found = {fault.partition(":")[0] for fault in accessibility_faults(page)}
    assert found == {"color-contrast", "aria-input-field-name"}


def test_hostile_text_runs_nothing(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file)
    assert page.title() == "Tokens of rows.jsonl"
    assert page.locator("img").count() == 0
    assert "<script>" not in page.locator("main").inner_html()
    assert "onerror" in page.locator("#row-1").inner_text().replace(" ", "").replace("\n", "")


def test_the_pointer_and_the_focus_show_the_id(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file, width=NARROW)
    bar = page.locator(".tk-bar")
    page.locator("#row-1 .tk", has_text="Paris").hover()
    assert bar.inner_text() == "␣Parisspace Paris, token 14, id 6233, trained on"
    page.locator("h1").hover()
    assert bar.is_hidden()
    page.locator("#row-1 .tk", has_text="France").focus()
    assert "id 5611" in bar.inner_text()
    page.locator("#row-1 .tk:focus").blur()
    assert bar.is_hidden()


def test_one_tab_stop_for_each_turn_and_arrows_inside(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file)
    focused = page.locator(":focus")

    def press(*keys: str) -> str:
        for key in keys:
            page.keyboard.press(key)
        return focused.get_attribute("aria-label") or focused.inner_text()

    assert press("Tab") == "Skip to the tokens"
    assert press("Enter", "Tab").startswith("control token <s>, token 0,")
    # the next turn, whether by Tab or by the arrows
    assert press("Tab").startswith("control token [INST], token 1,")
    assert press("ArrowLeft").startswith("control token <s>")
    assert press("ArrowRight", "ArrowRight").startswith("space What, token 2,")
    # the list keeps its place for Tab
    assert press("Tab", "Shift+Tab").startswith("space What")
    page.locator("#row-3 .tk-found a").click()
    assert page.evaluate("document.activeElement.id") == "row-3-wrong"


def test_equal_and_different_tokens_of_a_line_are_aligned(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file)
    first, second = (
        page.evaluate(
            """number => [...document.querySelectorAll("#row-3 .tk-list")[1].querySelectorAll(".tk")].slice(0, 6)
                .map((one) => one.querySelectorAll(".tk-cell")[number].getBoundingClientRect().top)""",
            number,
        )
        for number in (0, 1)
    )
    # [INST] is equal in both tokenizers, and the first word is not
    assert page.locator("#row-3 .tk-list").nth(1).locator(".tk-wrong").count() > 0
    assert (len(set(first)), len(set(second))) == (1, 1)
    assert first[0] < second[0]


def test_without_its_script_the_page_shows_ids(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file, script=False)
    token = page.locator("#row-1 .tk", has_text="Paris")
    token.hover()
    shown = token.evaluate("one => getComputedStyle(one, '::after').content")
    assert "attr(aria-label)" in shown or "id 6233" in shown


def test_ten_thousand_tokens_do_not_lag(long_file: Path, open_page: OpenPage) -> None:
    start = time.perf_counter()
    page = open_page(long_file, width=NARROW)
    assert page.locator(".tk").count() > 10_000
    loaded = time.perf_counter() - start
    assert sideways_scroll(page) == 0
    # every hundredth token, in the page itself: the time of the protocol is not that of the page
    hovered = page.evaluate(
        """() => {
            const tokens = [...document.querySelectorAll(".tk")].filter((_, n) => n % 100 === 0);
            const start = performance.now();
            for (const one of tokens) {
                one.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
                document.querySelector(".tk-bar").getBoundingClientRect();
            }
            return (performance.now() - start) / tokens.length;
        }"""
    )
    page.locator(".tk").nth(5).focus()
    start = time.perf_counter()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    moved = time.perf_counter() - start
    times = {"load, s": (loaded, SECONDS), "hover, ms a token": (hovered, 50), "four keys, s": (moved, SECONDS)}
    # to see them: --log-cli-level=info
    logging.info("times: %s", {name: round(found, 2) for name, (found, _) in times.items()})
    assert {name: found for name, (found, most) in times.items() if found > most} == {}
