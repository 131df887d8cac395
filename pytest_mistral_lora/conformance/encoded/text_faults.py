"""Ids as control tokens with the texts between them, and the class of a difference between two such lists.

A trainer's ids rarely differ by a token alone: a template leaves out a block, puts the system prompt elsewhere or trims
a text. So both sides are cut at their control tokens, aligned by these, and each difference is named by the control
tokens and texts in it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from itertools import groupby, pairwise

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.encoded import EncodingFault

WINDOW = 300
"""Parts that are compared: enough for a class, and few enough for a row of thousands of turns."""

_V1_MARKER = re.compile(r"(\[/?INST\])")
_TOOLS = (
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CONTENT]"),
)
_SYSTEM = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
_USER = ("[INST]", *_SYSTEM, "")


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


def _joined(parts: Sequence[MarkedText]) -> str:
    return "\n".join(part.text for part in parts)


@dataclass(frozen=True)
class TextComparison:
    """The parts of a row beside mistral-common's.

    Attributes:
        row: The chat row.
        expected: mistral-common's parts of the row.
        found: The trainer's; they differ from `expected`.
    """

    row: Row
    expected: Sequence[MarkedText]
    found: Sequence[MarkedText]

    def faults(self) -> Iterator[EncodingFault]:
        """Yield the rules that the differences break; a rule may come more than once."""
        missing = Counter(part.marker for part in self.expected)
        missing.subtract(Counter(part.marker for part in self.found))
        written = [marker for marker, count in missing.items() if marker and count > 0 and self._extra_text(marker) > 0]
        if written:
            yield EncodingFault("ML524", f"{', '.join(sorted(written))} is there as text, not as control token")
            return
        for hunk in diff_parts(self.expected, self.found):
            spelled = ["".join(part.spelled for part in side) for side in (hunk.expected, hunk.found)]
            # the same characters with more control tokens: a tokenizer found them in a text
            if without_spaces(spelled[0]) == without_spaces(spelled[1]) and hunk.surplus:
                markers = sorted({part.marker for run in hunk.surplus for part in run})
                yield EncodingFault("ML523", f"text became the control token {', '.join(markers)}")
                continue
            structure = [fault for run in hunk.missing for fault in self._missing_faults(run)]
            structure += [fault for run in hunk.surplus for fault in self._surplus_faults(run)]
            yield from structure
            # with its structure mended the hunk would be equal: its texts need no class of their own
            if structure and without_spaces(_joined(hunk.expected)) == without_spaces(_joined(hunk.found)):
                continue
            for expected, found in hunk.pairs:
                yield from self._pair_faults(expected, found)

    def _extra_text(self, marker: str) -> int:
        """Return how much more often a control token is spelled in the found texts than in the expected ones."""
        return sum(p.text.count(marker) for p in self.found) - sum(p.text.count(marker) for p in self.expected)

    def _texts(self, role: str = "") -> list[str]:
        return [text_of(m.get("content")) for m in self.row.messages if role in ("", m["role"])]

    @cached_property
    def _prompts(self) -> list[str]:
        return [text.strip() for text in self._texts("system") if text.strip()]

    def _missing_faults(self, run: tuple[MarkedText, ...]) -> Iterator[EncodingFault]:
        for marker in _main_markers(run):
            if marker in _TOOLS:
                yield EncodingFault("ML530", f"{marker} is missing")
            elif marker in _SYSTEM:
                texts = without_spaces(_joined(self.found))
                if self._prompts and all(without_spaces(prompt) in texts for prompt in self._prompts):
                    yield EncodingFault("ML526", f"{marker} is missing: the system prompt stands elsewhere")
                else:
                    yield EncodingFault("ML525", f"{marker} is missing: the system prompt is not there")
            elif marker in ("<s>", "</s>"):
                yield EncodingFault("ML521" if marker == "<s>" else "ML522", f"a {marker} is missing")
            else:
                lost = "is missing: a turn is lost, joined with another, or written without it"
                yield self._turn_fault(marker, lost)

    def _surplus_faults(self, run: tuple[MarkedText, ...]) -> Iterator[EncodingFault]:
        for marker in _main_markers(run):
            if marker and self._extra_text(marker) < 0:
                yield EncodingFault("ML523", f"text became the control token {marker}")
            elif marker == "<unk>":
                yield EncodingFault("ML532", "text became <unk>: it was encoded with another vocabulary")
            elif marker in _TOOLS:
                yield EncodingFault("ML530", f"{marker} is there once too often")
            elif marker in _SYSTEM:
                text = _joined(run)
                if any(without_spaces(prompt) in without_spaces(text) for prompt in self._prompts):
                    yield EncodingFault("ML526", "the system prompt has a block of its own")
                else:
                    found = f"a system prompt that the row does not have: {text.strip()[:60]!r}"
                    yield EncodingFault("ML527", found)
            elif marker in ("<s>", "</s>"):
                found = f"a {marker} is there that does not belong there"
                yield EncodingFault("ML521" if marker == "<s>" else "ML522", found)
            else:
                yield self._turn_fault(marker, "is there once too often: a turn more, or one that is cut in two")

    def _turn_fault(self, marker: str, found: str) -> EncodingFault:
        """Return the fault of a turn too few or too many; tools that stand elsewhere look like one of each."""
        expected_count, found_count = (sum(p.marker == marker for p in side) for side in (self.expected, self.found))
        if expected_count == found_count and any(part.marker == "[AVAILABLE_TOOLS]" for part in self.found):
            return EncodingFault("ML530", f"the tools stand on the other side of {marker or 'a text'}")
        return EncodingFault("ML533", f"{marker or 'a text'} {found}")

    def _pair_faults(self, expected: MarkedText, found: MarkedText) -> Iterator[EncodingFault]:
        """Yield the class of two texts after the same control token."""
        want, have = expected.text, found.text
        after = f"after {expected.marker or 'the start'}"
        # the first characters that differ, with 20 on each side
        at = next((n for n, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), min(len(want), len(have)))
        around = slice(max(0, at - 20), at + 20)
        shown = f"{after}: {have[around]!r}, expected {want[around]!r}"
        own = [text.strip() for text in self._texts() if text != text.strip() and text.strip()]
        has_own_whitespace = any(text in want for text in own)
        if want == have:
            yield EncodingFault("ML532", f"{after}: the text is right, and its ids are others")
        elif want.strip() == have.strip():
            yield EncodingFault("ML529" if has_own_whitespace else "ML528", shown)
        # the text of a tool's result is the row's own; calls and tools are written by the template
        elif expected.marker in _TOOLS and expected.marker != "[/TOOL_RESULTS]":
            yield EncodingFault("ML530", shown)
        elif without_spaces(want) != without_spaces(have):
            yield from self._word_faults(expected.marker, want, have, shown)
        elif has_own_whitespace:
            yield EncodingFault("ML529", shown)
        elif any(one["role"] == two["role"] for one, two in pairwise(self.row.messages)):
            yield EncodingFault("ML533", f"messages are joined in another way, {shown}")
        else:
            yield EncodingFault("ML528" if any(prompt in want for prompt in self._prompts) else "ML529", shown)

    def _word_faults(self, marker: str, want: str, have: str, shown: str) -> Iterator[EncodingFault]:
        """Yield the classes of two texts with other words: system prompts first, then the rest without them."""
        moved = [p for p in self._prompts if want.count(p) != have.count(p)]
        if not moved:
            # a prompt that only stands elsewhere in the same text explains the difference, too
            rest = [(p, want.replace(p, "", 1), have.replace(p, "", 1)) for p in self._prompts if p in want]
            moved = [prompt for prompt, one, two in rest if without_spaces(one) == without_spaces(two)]
        for prompt in moved:
            if prompt in have or _joined(self.found).count(prompt) >= _joined(self.expected).count(prompt):
                yield EncodingFault("ML526", f"the system prompt {prompt[:60]!r} stands elsewhere")
            else:
                yield EncodingFault("ML525", f"the system prompt {prompt[:60]!r} is not there")
        for prompt in moved:
            more = want.count(prompt) - have.count(prompt)
            want = want if more < 0 else want.replace(prompt, "", 1)
            have = have if more > 0 else have.replace(prompt, "", 1)
        if moved and without_spaces(want) == without_spaces(have):
            return
        extra = self._text_in_front(want.strip(), have.strip())
        row_texts = repr(self.row.to_json()) + "".join(self._texts())
        if extra and marker in _USER and extra not in row_texts:
            found = f"a text that the row does not have stands in front: {extra[:60]!r}"
            yield EncodingFault("ML527", found)
        else:
            yield EncodingFault("ML534", shown)

    def _text_in_front(self, want: str, have: str) -> str:
        """Return the text before a text, or between the system prompt and it; empty if they differ by more."""
        for start in ("", *self._prompts):
            rest = want.removeprefix(start).strip()
            if want.startswith(start) and have.startswith(start) and have.endswith(rest):
                return have.removeprefix(start).removesuffix(rest).strip()
        return ""


def _main_markers(run: Sequence[MarkedText]) -> list[str]:
    """Return the markers of a run, without the EOS of a turn that is missing or surplus as a whole."""
    markers = [part.marker for part in run]
    inner = [marker for marker in markers if marker != "</s>"]
    return list(dict.fromkeys(inner or markers))
