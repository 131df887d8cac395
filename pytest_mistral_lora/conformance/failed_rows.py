"""The rows of findings as tokens, with the differences marked, for a page beside a report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.difference import plain_text, visible
from pytest_mistral_lora.chat.rows import parse_row
from pytest_mistral_lora.chat.token_rows import ShownToken, TokenRow, TokenSide, Wrong
from pytest_mistral_lora.errors import MistralLoraError

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.finding import Finding
    from pytest_mistral_lora.conformance.groups import FindingGroup
    from pytest_mistral_lora.conformance.targets import Target

_MOST = 50
"""Rows of a page; a report with more causes has the first ones of them."""


def failed_rows(causes: Iterable[FindingGroup], targets: Sequence[Target]) -> list[TokenRow]:
    """Return the row of each cause that has one, as mistral-common encodes it for the target of its check.

    A row that mistral-common refuses has no tokens, and is left out.

    Args:
        causes: The findings by cause.
        targets: The targets of the run; a check's name begins with that of its target.
    """
    # the name of a check is all that a finding keeps of its target, because findings travel between processes
    homes = {target.name: target for target in targets}
    rows: list[TokenRow] = []
    for cause in causes:
        target = homes.get(cause.check.partition("::")[0])
        if cause.simplest.row and target is not None and len(rows) < _MOST:
            rows += _shown_row(cause, target)
    return rows


def _shown_row(cause: FindingGroup, target: Target) -> list[TokenRow]:
    finding = cause.simplest
    try:
        oracle = target.oracle
        encoded = oracle.encode(parse_row(json.loads(finding.row)))
    except (MistralLoraError, ValueError):
        # the finding itself explains why; a page of tokens has nothing to show
        return []
    side = TokenSide.of("mistral-common", encoded, oracle.piece)
    title = f"{finding.rule} {finding.place or cause.check}"
    return [TokenRow.single(title, side, _wrong_tokens(finding, len(side.ids)))]


def _wrong_tokens(finding: Finding, count: int) -> list[Wrong]:
    """Return the tokens of mistral-common's encoding in whose place the judged encoding has another one."""
    wrong = []
    for column in finding.tokens.columns if finding.tokens else ():
        expected, found = column.tokens if len(column.tokens) == 2 else (None, None)
        if column.mark and expected is not None and expected.position < count:
            wrong.append(Wrong(expected.position, _words(expected), _words(found)))
    return wrong


def _words(token: ShownToken | None) -> str:
    if token is None:
        return "no token"
    return " ".join(filter(None, (str(token.id), visible(plain_text(token.piece)), token.label)))
