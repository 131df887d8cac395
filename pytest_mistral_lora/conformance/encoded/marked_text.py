"""Ids as control tokens and the texts between them, the differences of two such lists, and reasons for them.

Some reasons are easily taken for others: escapes, another key order, lost characters, a turn that was cut in two.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import groupby, pairwise
from typing import Any

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.encoded.fault import EncodingFault

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
        elif not oracle.facts.control_tokens:
            # [INST] and [/INST] are spelled in the text
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


_ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4})+")
MOST_WORDS = 2000
"""Words of a text that are compared to tell a changed conversation from another one."""


def text_reason(want: str, have: str, after: str) -> EncodingFault | None:
    """Return the fault of a text that says the same in another spelling, if it is one.

    Args:
        want: mistral-common's text.
        have: The trainer's.
        after: The place of both, for reports.
    """
    # more than spaces differ: the row's own text may have such escapes, too
    if "\\u" in have:
        tight = ["".join(text.split()) for text in (have, want, _letters_of(have), _letters_of(want))]
        if tight[0] != tight[1] and tight[2] == tight[3]:
            first = _ESCAPES.search(have)
            return EncodingFault("ML556", f"{after}: {first[0] if first else ''} is there for a letter", "UTF-8")
    one, other = _json_of(want), _json_of(have)
    if one is not None and one == other:
        if json.dumps(one) != json.dumps(other):
            key = next((a for a, b in zip(_keys(one), _keys(other), strict=False) if a != b), "")
            found = f"{after}: the key {key!r} stands elsewhere"
            return EncodingFault("ML557", found, "the keys in the order of the row")
        return None
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        if have == unicodedata.normalize(form, want):
            return EncodingFault("ML554", f"{after}: the text was brought into the form {form}", "as in the row")
    lost = Counter(want)
    lost.subtract(Counter(have))
    changed = {character for character, count in lost.items() if count}
    # the separators U+001C to U+001F are control characters, and spaces that a template trims
    unseen = {one for one in changed if unicodedata.category(one)[0] == "C" and not one.isspace()}
    dropped = str.maketrans("", "", "".join(unseen))
    if changed and changed == unseen and want.translate(dropped) == have.translate(dropped):
        names = ", ".join(f"U+{ord(character):04X}" for character in sorted(changed))
        return EncodingFault("ML554", f"{after}: {names} is there in another number than in the row", "as in the row")
    return None


def _letters(found: re.Match[str]) -> str:
    try:
        letters: str = json.loads(f'"{found[0]}"')
        letters.encode()
    except (ValueError, UnicodeEncodeError):
        return found[0]
    return letters


def _letters_of(text: str) -> str:
    return _ESCAPES.sub(_letters, text)


def _json_of(text: str) -> Any:
    """Return the JSON object or list that a text is; None if it is none."""
    if text.strip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _keys(value: Any) -> list[str]:
    """Return the keys of all objects within a JSON value, in their order."""
    if isinstance(value, dict):
        return [key for name, item in value.items() for key in (name, *_keys(item))]
    return [key for item in value for key in _keys(item)] if isinstance(value, list) else []


def is_same_conversation(own: Sequence[str], spelled: str) -> bool:
    """Return whether a text has one of a row's texts, or one that is much like them.

    Args:
        own: The texts of the row.
        spelled: The whole text of the trainer's ids.
    """

    def plain(text: str) -> str:
        # not in lower case: "Hi" would be found in "Which"
        form = unicodedata.normalize("NFKC", without_spaces(text))
        return "".join(one for one in form if unicodedata.category(one)[0] not in "CZ")

    whole = plain(_letters_of(spelled))
    if any(text in whole for text in map(plain, own) if text):
        return True
    words, others = (re.findall(r"\w+", text)[:MOST_WORDS] for text in (" ".join(own), spelled))
    return SequenceMatcher(None, words, others, autojunk=False).ratio() >= 0.5


def spells_row(row: Row, parts: Sequence[MarkedText]) -> bool:
    """Return whether the parts of its ids spell texts of a row, or the row has none."""
    texts = [text_of(message.get("content")) for message in row.messages if message["role"] != "tool"]
    names = [call["function"]["name"] for message in row.messages for call in message.get("tool_calls") or ()]
    own = [text for text in (*texts, *names) if text]
    return not own or is_same_conversation(own, "".join(part.spelled for part in parts))


def surplus_eos(expected: Sequence[tuple[str, str]], found: Sequence[tuple[str, str]]) -> str:
    """Return where an EOS stands that does not belong there.

    Args:
        expected: Control token and text of each of mistral-common's parts.
        found: Those of the trainer's.
    """

    def before_eos(parts: Sequence[tuple[str, str]]) -> Counter[tuple[str, bool]]:
        pairs = pairwise(parts)
        return Counter((one[0], not one[1].strip()) for one, other in pairs if other[0] == "</s>")

    surplus = before_eos(found)
    surplus.subtract(before_eos(expected))
    # an EOS after nothing is an answer of its own, or one more; else a text is closed that should go on
    for (marker, is_empty), count in sorted(surplus.items(), key=lambda item: (not item[0][1], item[0][0])):
        if count > 0 and is_empty and marker == "</s>":
            return "a second </s> stands behind an answer's own"
        if count > 0:
            what = "an answer of nothing but </s>" if is_empty else "a </s> behind a text"
            return f"{what} stands after {marker or 'the start'} that does not belong there"
    return "a </s> is there that does not belong there"


def split_calls(expected: Sequence[str], found: Sequence[str]) -> tuple[int, int] | None:
    """Return how many turns of calls are expected and found, if calls of one turn were made several turns; else None.

    Args:
        expected: The control tokens of mistral-common's ids.
        found: Those of the trainer's.
    """
    calls = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def turns(markers: Sequence[str]) -> int:
        pairs = zip(("", *markers), (*markers, ""), strict=True)
        # up to v7 a marker opens all calls of a turn; after that each call has one, and EOS closes them
        return sum(one in calls and other not in calls for one, other in pairs)

    wanted, made = turns(expected), turns(found)
    return (wanted, made) if 0 < wanted < made else None
