"""Tokens in HTML: rows of tokens as a part of any page, and as a page of their own that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from pytest_mistral_lora import __version__
from pytest_mistral_lora.chat.difference import plain_text, visible
from pytest_mistral_lora.chat.token_rows import Column, ShownToken, TokenRow
from pytest_mistral_lora.errors import one_line

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_ROLES = ("system", "user", "assistant", "tool")
MOST = 500
"""Characters of a title or a note; a longer one is cut."""
_SPOKEN = {" ": "space", "\n": "newline", "\t": "tab"}
_LABELS = {"": "", "-100": "not trained on", "train": "trained on", "?": "no label"}


def tokens_html(rows: Sequence[TokenRow], *, prefix: str = "row", level: int = 2) -> Markup:
    """Return rows of tokens as HTML, for a page that has `tokens_css()` in its style and `tokens_script()` at its end.

    Each row is an `article` with a heading, the numbers of its tokens, and a list of tokens for each turn. Its colours
    follow `prefers-color-scheme`. A screen reader reads each token with its id and whether it is trained on; the
    script adds the arrow keys, and a bar with the same words for the token under the pointer or the focus. Without the
    script the page still shows everything. Text of rows is escaped, and characters that cannot be printed, such as bidi
    controls and NUL, are spelled out.

    Args:
        rows: The rows. A row of one encoding marks the tokens that are wrong, with the expected and the found value;
            a row of two shows them aligned, the expected one above.
        prefix: Beginning of the ids of its elements, letters, digits and hyphens; another for each call in a page.
        level: The level of the headings of rows; those of turns are one below.

    Returns:
        Markup, which an environment with autoescape prints as it is.
    """
    from markupsafe import Markup

    template = _environment().get_template("tokens.html.jinja")
    return Markup(template.render(rows=rows, prefix=prefix, level=level, roles=_ROLES))


def tokens_legend(rows: Sequence[TokenRow]) -> Markup:
    """Return the legend of colours, marks and keys, once for each page."""
    sides = max((len(row.sides) for row in rows), default=1)
    module = _environment().get_template("tokens.html.jinja").make_module({"rows": (), "roles": _ROLES})
    legend: Markup = module.legend(sides)  # type: ignore[attr-defined]
    return legend


@cache
def tokens_css() -> str:
    """Return the rules of style of `tokens_html`; all of its classes begin with `tk`."""
    return _text_of("tokens.css")


@cache
def tokens_script() -> str:
    """Return the script of `tokens_html`, for one `script` element at the end of a page."""
    return _text_of("tokens.js")


def script_hash(script: str) -> str:
    """Return a source of a Content Security Policy that allows this inline script and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def tokens_page(rows: Sequence[TokenRow], *, heading: str, notes: Sequence[str] = ()) -> str:
    """Return rows of tokens as one HTML page that loads nothing else, and whose policy forbids any other script.

    Args:
        rows: The rows.
        heading: Its title.
        notes: Paragraphs for its head.
    """
    return (
        _environment()
        .get_template("tokens_page.html.jinja")
        .render(
            rows=rows,
            heading=heading,
            notes=notes,
            fragment=tokens_html(rows),
            legend=tokens_legend(rows),
            css=tokens_css(),
            script=tokens_script(),
            script_hash=script_hash(tokens_script()),
            version=__version__,
        )
    )


def glyphs(piece: str) -> str:
    """Return a piece of a vocabulary as its text, in which spaces and newlines can be seen."""
    return visible(plain_text(piece)) or "∅"


def facts(row: TokenRow) -> list[str]:
    """Return the numbers of tokens of each encoding of a row, in words."""
    lines = []
    for name, tokens, trained in row.counts():
        supervised = "labels not known" if trained is None else f"{trained:,} trained on"
        lines.append(f"{one_line(name, MOST)}: {tokens:,} token{'' if tokens == 1 else 's'}, {supervised}")
    return lines


def differences(row: TokenRow) -> str:
    """Return the number of tokens that differ, and the place of the first, in words; empty if none does."""
    if row.first_wrong is None:
        return ""
    first = next((one.position for one in row.columns[row.first_wrong].tokens if one is not None), None)
    words = f"{row.wrong:,} {'difference' if len(row.sides) > 1 else 'wrong token'}{'' if row.wrong == 1 else 's'}"
    return f"{words}, the first at {'the end' if first is None else f'token {first}'}"


def owner(columns: Sequence[Column]) -> str:
    """Return the owner of some tokens, and whether they are trained on, in words."""
    first = columns[0]
    if first.turn is None:
        is_start = len(columns) == 1 and any(one is not None and one.position == 0 for one in first.tokens)
        name = "beginning" if is_start else "prompt"
    else:
        name = f"turn {first.turn}: {first.role}"
    label = next((one.label for one in first.tokens if one is not None), "")
    return ", ".join(filter(None, (name, _label_words(label))))


def _label_words(label: str) -> str:
    return _LABELS.get(label) or label.replace("train ", "trained on as id ")


def _note(column: Column) -> str:
    found = f", found {one_line(column.found, MOST)}" if column.found else ""
    return f"expected {one_line(column.expected, MOST)}{found}"


def _spoken(column: Column, sides: Sequence[str]) -> str:
    """Return the words with which a screen reader reads the tokens of a column."""
    if len(sides) == 1:
        token = column.tokens[0]
        words = [_token_words(token)] if token is not None else ["no token"]
        words += [f"wrong: {_note(column)}"] if column.expected else ["wrong"] * bool(column.mark)
    else:
        pairs = zip(sides, column.tokens, strict=True)
        words = [f"{one_line(name)}: {_token_words(token) if token else 'no token'}" for name, token in pairs]
        words += ["different"] if column.mark else []
    return "; ".join(words)


def _token_words(token: ShownToken) -> str:
    text = plain_text(token.piece)
    if token.control:
        name = f"control token {text}"
    elif len(text) == 1 and text not in _SPOKEN and text.isprintable() and not text.isalnum():
        name = unicodedata.name(text, text).lower()
    else:
        # its glyphs for white space have names that help nobody
        name = "".join(f" {_SPOKEN[one]} " if one in _SPOKEN else visible(one) for one in text)
    words = (" ".join(name.split()), f"token {token.position}", f"id {token.id}", _label_words(token.label))
    return ", ".join(filter(None, words))


def ends_line(column: Column) -> bool:
    """Return whether a line of the text ends with a column."""
    return any(token is not None and "\n" in plain_text(token.piece) for token in column.tokens)


def _text_of(name: str) -> str:
    return files("pytest_mistral_lora.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    # autoescape, because the text of a row may be HTML
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_text_of),
    )
    environment.filters |= {
        "glyphs": glyphs,
        "facts": facts,
        "differences": differences,
        "owner": owner,
        "note": _note,
        "spoken": _spoken,
        "ends_line": ends_line,
        "line": lambda text: one_line(text, MOST),
    }
    return environment
