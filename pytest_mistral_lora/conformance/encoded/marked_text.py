"""Ids as control tokens and the texts between them, and the differences of two such lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import groupby

from pytest_mistral_lora.chat.oracle import Oracle

WINDOW = 300
"""Parts that are compared: enough for a class, and few enough for a row of thousands of turns."""

_V1_MARKER = re.compile(r"(\[/?INST\])")


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A control token and the text up to the next one.

    Attributes:
        marker: The control token as it is written; empty for a text at the start.
        text: The text, decoded.
        ids: The text's ids; empty for v1, whose `[INST]` is itself text.
    """

    marker: str
    text: str
    ids: tuple[int, ...] = ()

    @property
    def spelled(self) -> str:
        """The whole part as text."""
        return self.marker + self.text


def decode_text(ids: Sequence[int], oracle: Oracle) -> str:
    """Return the text of ids, with the leading space that SentencePiece drops at the start of a text."""
    # "a" keeps the decoder from taking the first space of the ids for the one that it puts before every text
    before = oracle.encode_text("a")
    return oracle.decode([*before, *ids]).removeprefix("a") if ids else ""


def split_at_markers(ids: Sequence[int], oracle: Oracle) -> list[MarkedText]:
    """Return ids as control tokens and texts; ids outside the vocabulary are not allowed."""
    # no text encodes to <unk>, so it parts texts like a control token
    markers = {oracle.unk_id: "<unk>", **oracle.control_tokens}
    parts = [MarkedText("", "")]
    for is_marker, group in groupby(ids, markers.__contains__):
        run = tuple(group)
        if is_marker:
            parts += [MarkedText(markers[token], "") for token in run]
        elif oracle.version == "v1":
            # v1 has no control tokens but BOS and EOS: [INST] and [/INST] are spelled in the text
            before = parts.pop()
            first, *rest = _V1_MARKER.split(decode_text(run, oracle))
            parts.append(MarkedText(before.marker, first))
            parts += [MarkedText(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
        else:
            parts.append(MarkedText(parts.pop().marker, decode_text(run, oracle), run))
    return parts if parts[0] != MarkedText("", "") else parts[1:]


@dataclass(frozen=True, slots=True)
class Hunk:
    """A run of parts that differ.

    Attributes:
        expected: The expected parts.
        found: The parts found in their place.
        pairs: Parts of equal markers that stand for one another.
        missing: Expected parts without a counterpart, in runs.
        surplus: Found parts without a counterpart, in runs.
    """

    expected: tuple[MarkedText, ...]
    found: tuple[MarkedText, ...]
    pairs: list[tuple[MarkedText, MarkedText]] = field(default_factory=list)
    missing: list[tuple[MarkedText, ...]] = field(default_factory=list)
    surplus: list[tuple[MarkedText, ...]] = field(default_factory=list)


def diff_parts(expected: Sequence[MarkedText], found: Sequence[MarkedText]) -> list[Hunk]:
    """Return the differences of two lists of parts; the parts of each difference are matched by their markers.

    Of long lists only the first `WINDOW` parts from the first difference on are compared.
    """
    # most faults leave the structure as it is, and need no alignment
    if [part.marker for part in expected] == [part.marker for part in found]:
        differing = [(one, two) for one, two in zip(expected, found, strict=True) if one != two]
        return [Hunk((one,), (two,), [(one, two)]) for one, two in differing[:WINDOW]]
    start = next((n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), 0)
    one, two = expected[start : start + WINDOW], found[start : start + WINDOW]
    codes = [code for code in SequenceMatcher(None, one, two, autojunk=False).get_opcodes() if code[0] != "equal"]
    if len(codes) > 1 and max(len(expected), len(found)) - start > WINDOW and codes[-1][2] == len(one):
        codes.pop()  # the end of the window makes it, not the row
    hunks = []
    for _, *bounds in codes:
        a, b, c, d = bounds
        hunk = Hunk(tuple(one[a:b]), tuple(two[c:d]))
        markers = [part.marker for part in hunk.expected], [part.marker for part in hunk.found]
        for tag, a, b, c, d in SequenceMatcher(None, *markers, autojunk=False).get_opcodes():
            if tag == "equal":
                pairs = zip(hunk.expected[a:b], hunk.found[c:d], strict=True)
                hunk.pairs.extend(pair for pair in pairs if pair[0] != pair[1])
                continue
            hunk.missing.extend([hunk.expected[a:b]] if a < b else [])
            hunk.surplus.extend([hunk.found[c:d]] if c < d else [])
        hunks.append(hunk)
    return hunks


def without_spaces(text: str) -> str:
    """Return a text without its whitespace, and without the sign that SentencePiece decodes to a space."""
    return "".join(text.replace("▁", " ").split())
