"""Hooks of MkDocs: the site has pages made from the code, and the files outside docs/ that its pages link to.

In the repository, a page that is made for the site is linked by what it is made from: a rule by its line in rules.md,
the incidents by their table in the code, the published templates by their register. In the site, such a link leads to
the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL
from tempfile import TemporaryDirectory
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_MADE_FROM = {
    "tests/mutants/incidents.py": "incidents.md",
    "pytest_mistral_lora/field/templates/published.toml": "published.md",
    "tests/chat/recordings.toml": "recordings.md",
}
"""A page of the site, by the file in the repository that it is made from."""
_RULE_LINE = re.compile(r'^\| <a id="ml\d+"></a>(ML\d+) \|', flags=re.MULTILINE)
_LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, the files outside docs/ that are linked to, and those that they link to."""
    for place, text in _made_pages().items():
        if page := files.get_file_from_path(place):
            files.remove(page)  # its tables are missing in the repository
        files.append(File.generated(config, place, content=text))
    known = {file.src_uri for file in files} | _MADE_FROM.keys()
    waiting = [file.src_uri for file in files.documentation_pages() if _source(file.src_uri).is_file()]
    waiting.append("CHANGELOG.md")
    while waiting:
        place = waiting.pop()
        source = _source(place)
        if place not in known:
            known.add(place)
            files.append(File.generated(config, place, abs_src_path=str(source)))
        if source.suffix == ".md":
            links = _LINK.findall(source.read_text(encoding="utf-8"))
            linked = dict.fromkeys(_place(_target(source, path)) for _, path, _ in links)
            waiting += [target for target in linked if target not in known and _source(target).is_file()]
    return files


def _made_pages() -> dict[str, str]:
    """Return the pages that are made from the code, by their places."""
    with TemporaryDirectory() as folder:
        # MkDocs undoes what a hook adds to sys.path, and the script imports the gallery of the tests by name
        command = [sys.executable, ROOT / "scripts" / "write_docs.py", "--site", folder]
        subprocess.run(command, check=True, stdout=DEVNULL)
        pages = sorted(Path(folder).rglob("*.md"))
        return {page.relative_to(folder).as_posix(): page.read_text(encoding="utf-8") for page in pages}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead each link to the place that its file has in the site, and each rule to its page."""
    place = page.file.src_uri
    if place == "rules.md":
        markdown = _RULE_LINE.sub(r"| [\1](rules/\1.md) |", markdown)
    source = _source(place)
    folder = os.path.dirname(place)  # noqa: PTH120 - a place in the site is no path of this machine

    def led(link: re.Match[str]) -> str:
        target, anchor = _led(_place(_target(source, link[2])), link[3] or "")
        return link[1] + os.path.relpath(target, folder or ".") + anchor

    return _LINK.sub(led, markdown)


def _led(place: str, anchor: str) -> tuple[str, str]:
    """Return the place in the site that a link of the repository leads to, and its anchor."""
    if place == "rules.md" and re.fullmatch(r"#ml\d+", anchor):
        return f"rules/{anchor[1:].upper()}.md", ""
    return _MADE_FROM.get(place, place), anchor


def _target(source: Path, link: str) -> Path:
    """Return the file that a link leads to; a folder stands for the page in it."""
    target = Path(os.path.normpath(source.parent / link))
    return target / "README.md" if target.is_dir() else target


def _place(file: Path) -> str:
    """Return the place of a file in the site: below docs/, or as in the repository."""
    return file.relative_to(DOCS if file.is_relative_to(DOCS) else ROOT).as_posix()


def _source(place: str) -> Path:
    return DOCS / place if (DOCS / place).exists() else ROOT / place
