"""What GitHub makes of Markdown: rendered by its parser, and searched outside code as GitHub searches it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

import cmarkgfm
from cmarkgfm.cmark import Options

_TAGS = {"h2", "h3", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}
"""The tags of a comment or a summary of ours."""

FOUND_OUTSIDE_CODE = {
    # https://github.com/gjtorikian/html-pipeline/blob/main/lib/html_pipeline/node_filter/mention_filter.rb
    "mention": r"(?:^|\W)@[a-z0-9]",
    "issue": r"#\d|\bGH-\d",
    "commit": r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b",
    "emoji": r":[\w+-]+:",
    "link": r"www\.|://|mailto:",
    "math": r"\$",
}
"""What GitHub looks for in the text of the HTML, except in code and links."""


@dataclass
class Rendered:
    """A rendered Markdown text.

    Attributes:
        code: The text of each code span and block.
        outside: The text of each line outside code.
        tags: The tags, with their attributes, in order.
    """

    code: list[str] = field(default_factory=list)
    outside: str = ""
    tags: list[str] = field(default_factory=list)

    def faults(self) -> list[str]:
        """Return what GitHub would make of a text that it must only show."""
        found = [f"<{tag}>" for tag in self.tags if tag.split(" ")[0] not in _TAGS]
        for name, pattern in FOUND_OUTSIDE_CODE.items():
            found += [f"{name} {match[0]!r}" for match in re.finditer(pattern, self.outside, re.IGNORECASE)]
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found, self._depth = Rendered(), 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.tags.append(
            " ".join([tag, *(f"{name}={value}" for name, value in attrs if tag not in ("th", "td"))])
        )
        if tag == "code":
            self._depth += 1
            self.found.code.append("")

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag == "code"

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.found.code[-1] += data
        else:
            self.found.outside += data


def rendered(markdown: str) -> Rendered:
    """Return a text as GitHub shows it."""
    reader = _Reader()
    # raw HTML stays, so that the reader sees it; GitHub removes some of it
    reader.feed(cmarkgfm.github_flavored_markdown_to_html(markdown, options=Options.CMARK_OPT_UNSAFE))
    reader.close()
    return reader.found
