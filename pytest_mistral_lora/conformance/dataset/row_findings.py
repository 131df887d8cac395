"""The findings of one row: refused or changed by the recipe's policies, against a law, or with a suspicious text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, Policy, PolicyFault
from pytest_mistral_lora.chat.rows import Row, weight_of
from pytest_mistral_lora.conformance.dataset.tool_use import call_findings
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.mask.laws import LAWS
from pytest_mistral_lora.errors import RowError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


_FAULTS = {"no-labels": "ML606", "nothing-supervised": "ML605", "too-long": "ML607"}


def fault_finding(fault: PolicyFault, error: RowError, encoded: EncodedRow, cut: Mapping[str, int]) -> Finding:
    """Return the finding for a refused row; for a row that is too long, with the parts that a cut would remove."""
    detail = error.next_step
    if fault == "too-long":
        detail = f"a cut would remove {_listed(cut)}"
        if cut["supervised tokens"] == encoded.supervised_tokens:
            detail += "; nothing that is trained on would be left"
    return Finding(_FAULTS[fault], error.found, error.place, error.expected, detail)


def _listed(cut: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in cut.items() if number)


_CHANGES = {
    "too-long": "dropped: {tokens} tokens, more than training.max_length = {max_length}",
    "nothing-supervised": "dropped: no token is trained on",
    "cut": "cut to training.max_length = {max_length}, without {cut}",
    "without-loss": "kept, though no token is trained on",
}


def changes(row: Row, encoded: EncodedRow, policy: Policy, cut: Mapping[str, int]) -> Iterator[tuple[str, Finding]]:
    """Yield each change that a recipe's policy makes to a row that it does not refuse: its name, and a finding."""
    for change in policy.apply(encoded).changes:
        known = {"tokens": len(encoded.input_ids), "max_length": policy.max_length, "cut": _listed(cut)}
        yield change, Finding("ML620", _CHANGES[change].format(**known), row.place)


def beyond(row: Row, encoded: EncodedRow, layout: EncodedRow, max_length: int, version: str) -> dict[str, int]:
    """Count the tokens, supervised tokens, closing EOS and system prompts that a cut at `max_length` would remove.

    Args:
        row: The row.
        encoded: The encoding that is trained on.
        layout: mistral-common's encoding, whose spans give the owner of each token; `encoded` if there is none.
        max_length: Tokens that a cut would leave.
        version: Tokenizer version.
    """
    labels = (encoded.labels or ())[:max_length]
    closing = [span for span in layout.spans if span.kind == "eos" and span.end > max_length]
    start: int | None = None
    if any(message["role"] == "system" for message in row.messages):
        # up to v3 the system prompt is in the text of a user's turn: of the first in v1, of the last in v2 and v3.
        role = "user" if version in ("v1", "v2", "v3") else "system"
        starts = [span.start for span in layout.spans if span.role == role and span.kind == "text"]
        start = starts[-1 if version in ("v2", "v3") else 0] if starts else None
    return {
        "tokens": len(encoded.input_ids) - max_length,
        "supervised tokens": encoded.supervised_tokens - sum(label != IGNORE_INDEX for label in labels),
        "closing </s>": len(closing),
        "system prompt": int(start is not None and start >= max_length),
    }


ON_EVERY_ROW = frozenset({"ML101", "ML102", "ML103", "ML104", "ML105", "ML107", "ML109", "ML110"})
"""Rules of the laws that look at one encoding; the others encode the row again, and are left to Hypothesis."""


def law_findings(row: Row, encoded: EncodedRow, oracle: Oracle) -> Iterator[Finding]:
    """Yield the laws that a row's encoding breaks.

    Args:
        row: The row.
        encoded: mistral-common's encoding of it.
        oracle: Mistral's own tokenization.
    """
    version = int(oracle.version[1:])
    tools = bool(row.tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in row.messages)
    weights = any(message["role"] == "assistant" and not weight_of(message) for message in row.messages)
    for law in LAWS:
        holds = (law.rows == "tools" or not tools) and (law.rows == "weights" or not weights)
        if holds and law.rule in ON_EVERY_ROW and version >= int(law.since[1:]):
            violation = law.violation(row, encoded, oracle)
            if violation:
                yield Finding(law.rule, violation, row.place)


_DAMAGED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
"""U+FFFD, and control characters other than tab, newline, carriage return and U+0085."""


def text_findings(row: Row, layout: EncodedRow) -> Iterator[Finding]:
    """Yield texts that are hardly meant: joined turns, empty answers, damaged characters, odd tool calls.

    Args:
        row: The row.
        layout: Its encoding, whose spans give the owner of each token.
    """
    groups = [(group, "assistant") for group in row.assistant_groups() if len(group) > 1]
    pairs = itertools.pairwise(enumerate(row.messages))
    groups += [([n, n + 1], "user") for (n, a), (_, b) in pairs if a["role"] == b["role"] == "user"]
    for group, role in groups:
        found = f"messages[{group[0]}] to [{group[-1]}] are joined into one {role} turn"
        yield Finding("ML614", found, row.place)
    turns: dict[int | None, set[str]] = {}
    for span in layout.spans:
        if span.supervised:
            turns.setdefault(span.turn, set()).add(span.kind)
    for turn, kinds in turns.items():
        if kinds == {"eos"}:
            yield Finding("ML616", f"turn {turn}, the assistant's, has nothing but </s>", row.place)
    characters = {one for text in _strings(row.to_json()) for one in _DAMAGED.findall(text)}
    if characters:
        yield Finding("ML617", f"the row has {', '.join(f'U+{ord(one):04X}' for one in sorted(characters))}", row.place)
    yield from call_findings(row)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
