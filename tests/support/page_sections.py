"""The pages of docs/, and the sections of a page."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def section(page: str, heading: str) -> str:
    """Return the text of a section of a page of docs/, from its heading to the next one that is not below it."""
    lines: list[str] = []
    level, in_fence = 0, False
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines(keepends=True):
        in_fence ^= line.startswith("```")
        depth = 0 if in_fence else len(line) - len(line.lstrip("#"))
        if level and depth and depth <= level:
            break
        if depth and line.lstrip("#").strip() == heading:
            level = depth
        if level:
            lines.append(line)
    assert lines, (page, heading)
    return "".join(lines)
