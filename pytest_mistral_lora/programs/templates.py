"""The register of published chat templates: which template a text is.

`published.toml` of `field` has hashes and verdicts, and no text of a template. `scripts/record_published_templates.py`
writes it.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pytest_mistral_lora.programs.registry import TEMPLATES_GROUP, folder_of, own_points

FILE = "published.toml"
"""The name of a register's file, in the folder that a group of programs names."""


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
            a server or a derivative has it.
        origin: Where the package got it: a repository of Hugging Face, or the name of a server.
        sha256: SHA-256 of its bytes, in hex.
        text_sha256: SHA-256 of its text as Jinja reads it (`template_text`), in hex.
        version: The tokenizer version that it was judged by.
        judged_with: The tokenizer that it was judged by, by our name.
        own_prompt: The severity of the finding on its own system prompt, or `none`.
        causes: The causes of its differences from mistral-common on the packaged rows: names of faults, or shapes.
        engines: The verdict of each server with an engine of its own, by the kind of server.
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
    engines: Mapping[str, EngineVerdict]

    @property
    def title(self) -> str:
        """The repositories that have it, or the place that it was copied from."""
        if self.repositories:
            return ", ".join(self.repositories)
        return self.origin if "/" in self.origin else f"{self.origin}'s copy for {self.name}"


@dataclass(frozen=True, slots=True)
class TemplateRegister:
    """The published templates, with the versions that their verdicts were recorded by.

    Attributes:
        package: The package that the templates are from, with its version.
        date: The date of the package: a repository may have changed its template since.
        mistral_common: The version of mistral-common.
        engines: The version of each server whose engine was tried, by the kind of server.
        templates: The templates, in the order of their names.
    """

    package: str
    date: str
    mistral_common: str
    engines: Mapping[str, str]
    templates: tuple[PublishedTemplate, ...]

    def find(self, source: str) -> PublishedTemplate | None:
        """Return the published template that a text is; None if it is not one, such as a changed copy.

        Line endings and a newline at the very end do not count: Jinja ignores them.
        """
        digest = text_sha256(source)
        return next((template for template in self.templates if template.text_sha256 == digest), None)


def template_text(source: str) -> str:
    """Return a template as Jinja reads it: without carriage returns, and without a newline at the very end."""
    return source.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def text_sha256(source: str) -> str:
    """Return the SHA-256 of a template as Jinja reads it, in hex."""
    # the JSON of a hostile folder may have half a surrogate pair
    return hashlib.sha256(template_text(source).encode("utf-8", errors="surrogatepass")).hexdigest()


@cache
def published_templates() -> TemplateRegister:
    """Return the register of this package; an empty one without its `field`.

    Raises:
        EntryPointError: If its folder is not there.
    """
    for point in own_points(TEMPLATES_GROUP):
        return read_register(folder_of(point) / FILE)
    return TemplateRegister("", "", "", {}, ())


def read_register(path: Path) -> TemplateRegister:
    """Return the register of a file."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    engines = data["engines"]
    templates = tuple(_template(name, table, engines) for name, table in data.pop("templates").items())
    return TemplateRegister(**data, templates=templates)


def _template(name: str, table: Mapping[str, Any], engines: Iterable[str]) -> PublishedTemplate:
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
        {engine: _verdict(table[engine]) for engine in engines},
    )


def _verdict(table: Mapping[str, Any]) -> EngineVerdict:
    failed = {error: tuple(cases) for error, cases in table["failed"].items()}
    return EngineVerdict(table["same"], tuple(table["other"]), failed, tuple(table["unread"]))
