"""Hooks of MkDocs: the site has the files outside docs/ that its pages link to, such as examples and the changelog."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/ that are linked to, and those that they link to."""
    waiting = [file.src_uri for file in files.documentation_pages()] + ["CHANGELOG.md"]
    known = {file.src_uri for file in files}
    while waiting:
        place = waiting.pop()
        source = _source(place)
        if place not in known:
            known.add(place)
            files.append(File.generated(config, place, abs_src_path=str(source)))
        if source.suffix == ".md":
            links = _LINK.findall(source.read_text(encoding="utf-8"))
            linked = dict.fromkeys(_place(_target(source, path)) for _, path, _ in links)
            waiting += [one for one in linked if one not in known and _source(one).is_file()]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead each link to the place that its file has in the site."""
    source = _source(page.file.src_uri)
    folder = os.path.dirname(page.file.src_uri)  # noqa: PTH120 - a place in the site is no path of this machine

    def led(link: re.Match[str]) -> str:
        return link[1] + os.path.relpath(_place(_target(source, link[2])), folder or ".") + (link[3] or "")

    return _LINK.sub(led, markdown)


def _target(source: Path, link: str) -> Path:
    """Return the file that a link leads to; a folder stands for the page in it."""
    target = Path(os.path.normpath(source.parent / link))
    return target / "README.md" if target.is_dir() else target


def _place(file: Path) -> str:
    """Return the place of a file in the site: below docs/, or as in the repository."""
    return file.relative_to(DOCS if file.is_relative_to(DOCS) else ROOT).as_posix()


def _source(place: str) -> Path:
    return DOCS / place if (DOCS / place).exists() else ROOT / place
