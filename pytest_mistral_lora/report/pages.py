"""HTML pages that load nothing else: rows of tokens, and the report with its filters, tokens, rules and commands."""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.chat.diff import ShownToken
from pytest_mistral_lora.chat.pieces import plain_text, visible
from pytest_mistral_lora.chat.token_rows import Column, TokenRow
from pytest_mistral_lora.errors import and_more, one_line
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.records.files import beginning
from pytest_mistral_lora.report.outcomes import RecordedOutcome
from pytest_mistral_lora.report.tables import OUTCOMES, outcome_counts
from pytest_mistral_lora.report.tokens import MOST, differences, ends_line, facts, glyphs, label_words, owner

if TYPE_CHECKING:
    from pathlib import Path

    from jinja2 import Environment
    from markupsafe import Markup

    from pytest_mistral_lora.chat.objective import Objective

_ROLES = ("system", "user", "assistant", "tool")
_SPOKEN = {" ": "space", "\n": "newline", "\t": "tab"}
_WORST_FIRST = ("failed", "known", "skipped", "passed")


def tokens_html(rows: Sequence[TokenRow], *, prefix: str = "row", level: int = 2) -> Markup:
    """Return rows of tokens as HTML, for a page that has `tokens.css` in its style and `tokens.js` at its end.

    Each row is an `article` with a heading, the numbers of its tokens, and a list of tokens for each turn. Its colours
    follow `prefers-color-scheme`. A screen reader reads each token with its id and whether it is trained on; the
    script adds the arrow keys, and a bar with the same words for the token under the pointer or the focus. Without the
    script the page still shows everything. Text of rows is escaped, and characters that cannot be printed, such as bidi
    controls and NUL, are spelled out. All of its classes begin with `tk`.

    Args:
        rows: The rows. Two encodings of a row are aligned, the expected one above, with their differences marked.
        prefix: Beginning of the ids of its elements, letters, digits and hyphens; a different one for each call in a
            page.
        level: The level of the headings of rows; headings of turns are one level below.

    Returns:
        Markup, which an environment with autoescape prints unchanged.
    """
    from markupsafe import Markup

    template = _environment().get_template("tokens.html.jinja")
    return Markup(template.render(rows=rows, prefix=prefix, level=level))


def tokens_page(
    rows: Sequence[TokenRow], *, heading: str, notes: Sequence[str] = (), objectives: Sequence[Objective] = ()
) -> str:
    """Return rows of tokens as one HTML page; its policy forbids any other script.

    Args:
        rows: The rows.
        heading: Its title.
        notes: Paragraphs for its head.
        objectives: The objectives of the rows; the legend says them, unless they are the default.
    """
    script = asset("tokens.js")
    return (
        _environment()
        .get_template("tokens_page.html.jinja")
        .render(
            rows=rows,
            heading=heading,
            notes=notes,
            objectives=[objective for objective in objectives if not objective.is_default],
            fragment=tokens_html(rows),
            sides=max((len(row.sides) for row in rows), default=1),
            css=asset("tokens.css"),
            script=script,
            script_hash=script_hash(script),
            version=__version__,
        )
    )


def html_page(data: Mapping[str, Any], rows_page: str = "") -> str:
    """Return the result of `report_data` as an HTML page: findings by cause, with filters.

    Args:
        data: The report.
        rows_page: Name of the page with the tokens of the failed rows, beside the report; empty without such a page.
    """
    from pytest_mistral_lora.report.lines import objective_lines
    from pytest_mistral_lora.report.tables import named_figures, statistics_of

    outcomes = [*map(RecordedOutcome.of, data["checks"])]
    # one script element: the page's policy allows the hash of this text, and no script that a row could inject
    script = f"{asset('page.js')}\n{asset('tokens.js')}"
    causes, sides = [], 0
    for number, cause in enumerate(data["causes"]):
        row = TokenRow.from_json(cause["tokens"]) if cause["tokens"] else None
        sides = max(sides, len(row.sides) if row else 0)
        shown = tokens_html([row], prefix=f"tokens-{number}", level=4) if row else None
        causes.append({**cause, "row_tokens": shown})
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            data=data,
            heading=_heading(data, outcomes),
            causes=causes,
            sides=sides,
            # a report of an earlier version has no proofs
            signs=[(number, cause) for number, cause in enumerate(causes, start=1) if _is_sign(cause)],
            rules={cause["rule"]: cause for cause in causes},
            rule_urls={cause["rule"]: rule_url(cause["rule"]) for cause in causes},
            checks=sorted(data["checks"], key=lambda record: _WORST_FIRST.index(record["outcome"])),
            outcomes=OUTCOMES,
            table=outcome_counts(outcomes),
            opening=objective_lines(outcomes),
            objectives=(),
            figures={name: (facts, [*named_figures(facts)]) for name, facts in statistics_of(outcomes).items()},
            rows_page=rows_page,
            css=f"{asset('page.css')}\n{asset('tokens.css')}",
            script=script,
            script_hash=script_hash(script),
        )
    )


_MOST_NAMED = 3
"""Most targets that the heading of a report names."""


def _heading(data: Mapping[str, Any], outcomes: Sequence[RecordedOutcome]) -> str:
    """Return the names of the project and of the judged targets."""
    targets = [*dict.fromkeys(outcome.target for outcome in outcomes)]
    names = f"{', '.join(targets[:_MOST_NAMED])}{and_more(_MOST_NAMED, len(targets))}"
    # a report of an earlier version has no project
    return one_line(" / ".join(filter(None, (data.get("project", ""), names))) or "Mistral conformance")


def _is_sign(cause: Mapping[str, Any]) -> bool:
    return (cause["severity"], cause.get("proof")) == ("note", "sign")


_GENERATOR = '<meta name="generator" content="pytest-mistral-lora, {}">'


def is_report_page(file: Path) -> bool:
    """Return whether a file is the page of a report that we wrote."""
    return _GENERATOR.format("report") in beginning(file)


def is_tokens_page(file: Path) -> bool:
    """Return whether a file is a page of tokens that we wrote."""
    return _GENERATOR.format("tokens") in beginning(file)


@cache
def rule_url(rule: str) -> str:
    """Return the address of a rule's page; empty if the package does not name its documentation."""
    try:
        links = metadata("pytest-mistral-lora").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    named = dict(link.split(", ", 1) for link in links)
    return f"{named['Documentation'].rstrip('/')}/rules/{rule}/" if "Documentation" in named else ""


@cache
def asset(name: str) -> str:
    """Return a template, a style sheet or a script of this folder."""
    return files("pytest_mistral_lora.report").joinpath(name).read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """Return a source of a Content Security Policy that allows this inline script and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    # autoescape, because the text of a row may be HTML
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(asset),
    )
    environment.globals["roles"] = _ROLES
    environment.filters |= {
        "glyphs": glyphs,
        "facts": facts,
        "differences": differences,
        "owner": owner,
        "spoken": _spoken,
        "ends_line": ends_line,
        "with_code": _with_code,
        "line": lambda text, most=MOST: one_line(text, most),
    }
    return environment


def _shown(value: object) -> object:
    """Return a value of a page: a text without characters that are obeyed or hidden, but our mark-up unchanged."""
    from markupsafe import Markup

    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _with_code(text: str) -> Markup:
    """Return a text whose parts between backticks are marked as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(printable(text)))))


def _spoken(column: Column, sides: Sequence[str]) -> str:
    """Return the words that a screen reader reads for the tokens of a column."""
    words = [_token_words(token) if token else "no token" for token in column.tokens]
    if len(sides) > 1:
        words = [f"{one_line(name)}: {token}" for name, token in zip(sides, words, strict=True)]
    return "; ".join([*words, *(["different"] if column.mark else [])])


def _token_words(token: ShownToken) -> str:
    text = plain_text(token.piece)
    if token.control:
        name = f"control token {text}"
    elif len(text) == 1 and text not in _SPOKEN and text.isprintable() and not text.isalnum():
        name = unicodedata.name(text, text).lower()
    else:
        # the names of the glyphs for white space help nobody
        name = "".join(f" {_SPOKEN[letter]} " if letter in _SPOKEN else visible(letter) for letter in text)
    words = (" ".join(name.split()), f"token {token.position}", f"id {token.id}", label_words(token.label))
    return ", ".join(filter(None, words))
