from __future__ import annotations

import re
from html.parser import HTMLParser

from pytest_mistral_lora.chat.diff import TokenDiff, TokenSide
from pytest_mistral_lora.chat.token_rows import TokenRow
from pytest_mistral_lora.report.pages import asset, script_hash, tokens_html, tokens_page

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "\u202eevil\u2066",
    "\x00\x1b[31mred\x07",
    "</style><style>",
    "\ud800",
    "' onfocus='alert(1)",
)
"""Texts that break a page or a terminal that prints them as they are."""


class Reader(HTMLParser):
    """The tags, the attributes and the texts of a page, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_row() -> TokenRow:
    ids = range(len(HOSTILE))
    return TokenRow.single("".join(HOSTILE), TokenSide(HOSTILE[0], ids, None, HOSTILE.__getitem__))


def test_hostile_text_of_rows_stays_text() -> None:
    side = TokenSide(HOSTILE[1], (0,), None, HOSTILE.__getitem__)
    rows = [hostile_row(), TokenRow.compared("a", TokenDiff(side, side))]
    page = tokens_page(rows, heading="".join(HOSTILE), notes=HOSTILE)
    read = Reader(page)
    assert (read.tags.count("script"), read.tags.count("style"), "img" in read.tags) == (1, 1, False)
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in read.text
    page.encode()  # no lone surrogate is left
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)
    assert "\\u202eevil\\u2066" in read.text
    assert "\\x00\\x1b[31mred\\x07" in read.text


def test_the_policy_of_the_page_allows_its_own_script_alone() -> None:
    page = tokens_page([hostile_row()], heading="rows")
    found = re.search(r"<script>(.*)</script>", page, flags=re.DOTALL)
    assert found is not None
    assert found[1] == asset("tokens.js")
    assert f"script-src '{script_hash(found[1])}'" in page
    assert script_hash(found[1] + " ") not in page
    assert not re.search(r"(src|href)=.?(https?:|//)", page)


def test_each_token_is_read_with_its_text_its_id_and_its_loss() -> None:
    pieces = ("[INST]", "▁Paris", "\n", ".", "<0x0A>", "\t")
    row = TokenRow.single("a:1", TokenSide("side", range(6), [-100, 1, 2, 7, -100, 5], pieces.__getitem__))
    labels = [value for name, value in Reader(tokens_html([row])).attributes if name == "aria-label"]
    assert labels == [
        "control token [INST], token 0, id 0, not trained on",
        "space Paris, token 1, id 1, trained on",
        "newline, token 2, id 2, trained on",
        "full stop, token 3, id 3, trained on as id 7",
        "newline, token 4, id 4, not trained on",
        "tab, token 5, id 5, trained on",
    ]


def test_two_sides_are_read_with_their_names_and_the_difference() -> None:
    left, right = (TokenSide(name, ids, None, "ab".__getitem__) for name, ids in (("one", (0, 1)), ("two", (0,))))
    page = tokens_html([TokenRow.compared("a:1", TokenDiff(left, right))], prefix="finding-7", level=4)
    read = Reader(page)
    labels = [value for name, value in read.attributes if name == "aria-label"]
    assert labels == ["one: a, token 0, id 0; two: a, token 0, id 0", "one: b, token 1, id 1; two: no token; different"]
    assert "1 difference, the first at token 1" in read.text
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert all(one and one.startswith("finding-7-1") for one in ids)
    assert ("href", "#finding-7-1-wrong") in read.attributes
    assert "finding-7-1-wrong" in ids
    assert ("h4" in read.tags, "h5" in read.tags) == (True, True)
