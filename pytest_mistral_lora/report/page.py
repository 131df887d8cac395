"""The report as one HTML page that loads nothing else: findings by cause, filters, tokens, rules and commands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.token_rows import TokenRow
from pytest_mistral_lora.errors import one_line
from pytest_mistral_lora.report import OUTCOMES, outcome_counts
from pytest_mistral_lora.report.tokens import script_hash, tokens_css, tokens_html, tokens_legend, tokens_script

if TYPE_CHECKING:
    from markupsafe import Markup

_WORST_FIRST = ("failed", "known", "skipped", "passed")
_LONGEST_LINE = 2000


def html_page(data: Mapping[str, Any], rows_page: str = "") -> str:
    """Return the result of `report_data` as an HTML page.

    Args:
        data: The report.
        rows_page: Name of the page with the tokens of the failed rows, beside the report; empty if there is none.
    """
    from jinja2 import Environment, StrictUndefined

    from pytest_mistral_lora.report.statistics import named_figures, statistics_of

    # autoescape, because the text of a row may be HTML
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"line": lambda text: one_line(text, _LONGEST_LINE), "printable": _printable}
    # one script element: the policy of the page allows the hash of this text, and no script that a row could bring in
    script = f"{_text_of('page.js')}\n{tokens_script()}"
    causes = [{**cause, "row_tokens": _row_tokens(cause, f"tokens-{n}")} for n, cause in enumerate(data["causes"])]
    return environment.from_string(_text_of("page.html.jinja")).render(
        data=data,
        causes=causes,
        rules={cause["rule"]: cause for cause in causes},
        rule_urls={cause["rule"]: rule_url(cause["rule"]) for cause in causes},
        checks=sorted(data["checks"], key=lambda record: _WORST_FIRST.index(record["outcome"])),
        outcomes=OUTCOMES,
        table=outcome_counts(data["checks"]),
        figures={name: (one, [*named_figures(one)]) for name, one in statistics_of(data["checks"]).items()},
        legend=_legend(data["causes"]),
        rows_page=rows_page,
        css=f"{_text_of('page.css')}\n{tokens_css()}",
        script=script,
        script_hash=script_hash(script),
    )


def _row_tokens(cause: Mapping[str, Any], prefix: str) -> Markup | None:
    tokens = cause["tokens"]
    return None if tokens is None else tokens_html([TokenRow.from_json(tokens)], prefix=prefix, level=4)


def _legend(causes: Sequence[Mapping[str, Any]]) -> Markup | None:
    rows = [TokenRow.from_json(cause["tokens"]) for cause in causes if cause["tokens"]]
    return tokens_legend(rows) if rows else None


@cache
def rule_url(rule: str) -> str:
    """Return the address of a rule's page; empty if the package does not name its documentation."""
    try:
        links = metadata("pytest-mistral-lora").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    named = dict(link.split(", ", 1) for link in links)
    return f"{named['Documentation'].rstrip('/')}/rules/{rule}/" if "Documentation" in named else ""


def _printable(text: str) -> str:
    """Return a text of several lines in which NUL, bidi controls and the like are spelled out."""
    return re.sub(r"[^\n\t]", lambda found: found[0] if found[0].isprintable() else ascii(found[0])[1:-1], text)


def _text_of(name: str) -> str:
    return files("pytest_mistral_lora.report").joinpath(name).read_text(encoding="utf-8")
