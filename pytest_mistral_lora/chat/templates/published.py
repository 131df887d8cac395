"""The register of published chat templates: which template a text is, or which one it was made from.

`published.toml` has hashes and verdicts, and no text of a template. `scripts/record_published_templates.py` writes it.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "published.toml"
"""The register's file."""

_MARK_DIGITS = 8
_PIECES = re.compile(r"(?<=[%}]\})")
"""The ends of Jinja's tags: a template of one line still has many pieces."""
_LEAST_ALIKE = 0.5
"""A template with fewer equal pieces is not called a changed copy."""
_MOST_SHOWN = 8


@dataclass(frozen=True, slots=True)
class EngineVerdict:
    """What another template engine makes of the packaged rows that jinja2 renders.

    Attributes:
        same: The number of rows with the text of jinja2.
        other: The names of the rows with another text.
        failed: The names of the rows at which the template fails, by error.
        unread: The names of the rows that the server refuses before it renders the template.
    """

    same: int
    other: tuple[str, ...]
    failed: Mapping[str, tuple[str, ...]]
    unread: tuple[str, ...]

    @property
    def rows(self) -> int:
        """The number of rows that were rendered, or that the template failed at."""
        return self.same + len(self.other) + sum(len(cases) for cases in self.failed.values())


@dataclass(frozen=True, slots=True)
class PublishedTemplate:
    """A chat template that a public package ships, with its verdicts.

    Attributes:
        name: Its name in the package.
        repositories: The repositories of Mistral that have it, the one that it is named after first; empty if only
            llama.cpp or a derivative has it.
        origin: Where the package got it: a repository of Hugging Face, or `llama.cpp`.
        sha256: SHA-256 of its bytes, in hex.
        text_sha256: SHA-256 of its text as Jinja reads it (`template_text`), in hex.
        version: The tokenizer version that it was judged by.
        judged_with: The tokenizer that it was judged by, by our name.
        own_prompt: The severity of the finding on its own system prompt, or `none`.
        causes: The causes of its differences from mistral-common on the packaged rows: names of faults, or shapes.
        llamacpp: The verdict of llama.cpp's engine.
        lines: The marks of the pieces of each line, as `line_marks` makes them.
    """

    name: str
    repositories: tuple[str, ...]
    origin: str
    sha256: str
    text_sha256: str
    version: str
    judged_with: str
    own_prompt: str
    causes: tuple[str, ...]
    llamacpp: EngineVerdict
    lines: tuple[str, ...]

    @property
    def title(self) -> str:
        """The repositories that have it, or the place that it was copied from."""
        if self.repositories:
            return ", ".join(self.repositories)
        return self.origin if self.origin != "llama.cpp" else f"llama.cpp's copy for {self.name}"


@dataclass(frozen=True, slots=True)
class TemplateRegister:
    """The published templates, with the versions that their verdicts were recorded by.

    Attributes:
        package: The package that the templates are from, with its version.
        date: The date of the package: a repository may have changed its template since.
        mistral_common: The version of mistral-common.
        llamacpp: The build of llama.cpp.
        templates: The templates, in the order of their names.
    """

    package: str
    date: str
    mistral_common: str
    llamacpp: str
    templates: tuple[PublishedTemplate, ...]

    def find(self, source: str) -> TemplateMatch | None:
        """Return the published template that a text is, or the most similar one; None if none is similar.

        Line endings and a newline at the very end do not count: Jinja ignores them.
        """
        digest, lines = text_sha256(source), line_marks(source)
        equal = tuple(template for template in self.templates if template.text_sha256 == digest)
        if equal:
            return TemplateMatch(self, equal, is_unchanged=True)
        pieces = _count_pieces(lines)
        likeness = [_likeness(pieces, _count_pieces(template.lines)) for template in self.templates]
        most = max(likeness, default=0.0)
        if most < _LEAST_ALIKE:
            return None
        nearest = tuple(template for template, alike in zip(self.templates, likeness, strict=True) if alike == most)
        changes = tuple(_changed_lines(nearest[0].lines, lines))
        return TemplateMatch(self, nearest, is_unchanged=False, changes=changes)


@dataclass(frozen=True, slots=True)
class TemplateMatch:
    """The published template that a text is, or that it is most similar to.

    Attributes:
        register: The register.
        templates: The template; several if the text is as similar to each of them.
        is_unchanged: Whether the text is the template itself.
        changes: The differences, each as the first and the last line of the text, and the number of lines that differ.
    """

    register: TemplateRegister
    templates: tuple[PublishedTemplate, ...]
    is_unchanged: bool
    changes: tuple[tuple[int, int, int], ...] = ()

    @property
    def text(self) -> str:
        """The match in words."""
        titles = " or ".join(template.title for template in self.templates)
        published = f"{titles} ({self.register.date})"
        if self.is_unchanged:
            return f"that of {published}, unchanged"
        number = sum(size for _, _, size in self.changes)
        total = len(self.templates[0].lines)
        places = [str(first) if first == last else f"{first}-{last}" for first, last, _ in self.changes]
        shown = ", ".join(places[:_MOST_SHOWN]) + (", …" if len(places) > _MOST_SHOWN else "")
        differ = "differs" if number == 1 else "differ"
        where = "line" if len(places) == 1 and places[0].isdecimal() else "lines"
        return f"nearest to that of {published}; {number:,} of its {total:,} lines {differ}: {where} {shown} of yours"


def template_text(source: str) -> str:
    """Return a template as Jinja reads it: without carriage returns, and without a newline at the very end."""
    return source.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def text_sha256(source: str) -> str:
    """Return the SHA-256 of a template as Jinja reads it, in hex."""
    return hashlib.sha256(_bytes(template_text(source))).hexdigest()


def line_marks(source: str) -> tuple[str, ...]:
    """Return a text for each line of a template: the marks of its pieces, with spaces between them.

    A mark is the beginning of the SHA-256 of a piece, which ends after a tag of Jinja or with the line.
    """
    lines = template_text(source).split("\n")
    return tuple(" ".join(_mark(piece) for piece in _PIECES.split(line) if piece) for line in lines)


def _mark(piece: str) -> str:
    return hashlib.sha256(_bytes(piece)).hexdigest()[:_MARK_DIGITS]


def _bytes(text: str) -> bytes:
    # the JSON of a hostile folder may have half a surrogate pair
    return text.encode("utf-8", errors="surrogatepass")


def _count_pieces(lines: Sequence[str]) -> Counter[str]:
    return Counter(mark for line in lines for mark in line.split())


def _likeness(pieces: Counter[str], others: Counter[str]) -> float:
    """Return the share of equal pieces, regardless of their order: 0 to 1."""
    return 2 * (pieces & others).total() / max(1, pieces.total() + others.total())


def _changed_lines(published: Sequence[str], given: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Yield each run of different lines: the first and the last of the given lines, and the number that differs.

    Published lines that are missing have the place of the line before them.
    """
    matcher = difflib.SequenceMatcher(None, published, given, autojunk=False)
    for code, i, i_end, j, j_end in matcher.get_opcodes():
        if code != "equal":
            yield max(1, min(j + 1, j_end)), max(1, j_end), max(i_end - i, j_end - j)


@cache
def published_templates() -> TemplateRegister:
    """Return the register."""
    data = tomllib.loads(PATH.read_text(encoding="utf-8"))
    templates = tuple(_template(name, table) for name, table in data.pop("templates").items())
    return TemplateRegister(**data, templates=templates)


def _template(name: str, table: Mapping[str, Any]) -> PublishedTemplate:
    verdict = table["llamacpp"]
    failed = {error: tuple(cases) for error, cases in verdict["failed"].items()}
    return PublishedTemplate(
        name,
        tuple(table["repositories"]),
        table["origin"],
        table["sha256"],
        table["text_sha256"],
        table["version"],
        table["judged_with"],
        table["own_prompt"],
        tuple(table["causes"]),
        EngineVerdict(verdict["same"], tuple(verdict["other"]), failed, tuple(verdict["unread"])),
        tuple(table["lines"].removesuffix("\n").split("\n")),
    )
