"""The register of published chat templates: which template a text is.

`published.toml` has hashes and verdicts, and no text of a template. `scripts/record_published_templates.py` writes it.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "published.toml"
"""The register's file."""


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
    )
