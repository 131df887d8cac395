"""The class of a difference between two lists of control tokens with the texts between them.

A trainer's ids rarely differ by a single token: a template leaves out a block, puts the system prompt elsewhere or
trims a text. So both sides are cut at their control tokens, aligned by these, and each difference is named by the
control tokens and texts in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from pytest_mistral_lora.chat.chunks.registry import chunk_types
from pytest_mistral_lora.chat.diff import MarkedText, common_ends, diff_parts, equal_beginning
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.encoded.fault import EncodingFault
from pytest_mistral_lora.conformance.encoded.text_reasons import (
    CALL_MARKERS,
    split_calls,
    surplus_eos,
    text_reason,
    without_spaces,
)

_TOOLS = (
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CONTENT]",
)
_BEFORE_ANSWERS = ("[/INST]", "[/TOOL_RESULTS]")
_SYSTEM = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
_USER = ("[INST]", *_SYSTEM, "")
_LOST_TURN = "a turn is lost, joined with another, or written without it"
_LOST = {
    "[MODEL_SETTINGS]": "the row's settings, such as `reasoning_effort`, are not written",
}
"""The fault of a row that lacks the part after a marker, if the marker does not open a turn or a chunk."""


def _lost_part(marker: str) -> str:
    """Return the fault of a row that lacks the part after a marker."""
    of_chunks = {kind.literals[0]: kind.lost for kind in chunk_types().values() if kind.literals}
    return (_LOST | of_chunks).get(marker, _LOST_TURN)


def _joined(parts: Sequence[MarkedText]) -> str:
    return "\n".join(part.text for part in parts)


@dataclass(frozen=True)
class TextComparison:
    """The parts of a row, compared with mistral-common's.

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
        sides = (self.expected, self.found)
        several = any(len(message.get("tool_calls") or ()) > 1 for message in self.row.messages)
        # a [TOOL_CALLS] that was a text is no turn: its class is below
        from_text = any(self._extra_text(marker) < 0 for marker in CALL_MARKERS)
        if several and not from_text and (turns := split_calls(*([part.marker for part in side] for side in sides))):
            split = f"calls of one turn are turns of their own: {turns[1]} turns of calls in place of {turns[0]}"
            yield EncodingFault("ML555", split, "the calls of a message in one turn, closed by one </s>")
            return
        found_parts = list(self.found)
        for prompt in self._prompts:
            places = [
                n for n, part in enumerate(found_parts) if part.marker == "[INST]" and part.text.strip() == prompt
            ]
            if places and not any(part.marker == "[INST]" and part.text.strip() == prompt for part in self.expected):
                yield EncodingFault("ML526", f"the system prompt {prompt[:60]!r} stands in an [INST] of its own")
                # with its closing marker: the rest of the row is compared without them
                closes = places[0] + 1 < len(found_parts) and found_parts[places[0] + 1].spelled.strip() == "[/INST]"
                del found_parts[places[0] : places[0] + 1 + closes]
        for hunk in diff_parts(self.expected, found_parts):
            spelled = ["".join(part.spelled for part in side) for side in (hunk.expected, hunk.found)]
            # the same characters with more control tokens: a tokenizer found them in a text
            if without_spaces(spelled[0]) == without_spaces(spelled[1]) and hunk.surplus:
                markers = sorted({part.marker for run in hunk.surplus for part in run})
                yield EncodingFault("ML523", f"text became the control token {', '.join(markers)}")
                continue
            structure = [fault for run in hunk.missing for fault in self._missing_faults(run)]
            structure += [fault for run in hunk.surplus for fault in self._surplus_faults(run)]
            yield from structure
            # with the right structure the hunk would be equal: its texts need no other class
            if structure and without_spaces(_joined(hunk.expected)) == without_spaces(_joined(hunk.found)):
                continue
            for expected, found in hunk.pairs:
                yield from self._pair_faults(expected, found)

    def _extra_text(self, marker: str) -> int:
        """Return how many more times the found texts spell a control token than the expected ones."""
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
                    holder = next((part.marker for part in self.found if self._prompts[0] in part.text), "")
                    elsewhere = f"elsewhere, after {holder}" if holder else "elsewhere"
                    yield EncodingFault("ML526", f"{marker} is missing: the system prompt stands {elsewhere}")
                else:
                    yield EncodingFault("ML525", f"{marker} is missing: the system prompt is not there")
            elif marker in ("<s>", "</s>"):
                yield EncodingFault("ML521" if marker == "<s>" else "ML522", f"a {marker} is missing")
            else:
                yield self._turn_fault(marker, f"is missing: {_lost_part(marker)}")

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
                if marker == "</s>":
                    sides = (self.expected, self.found)
                    found = surplus_eos(*([(part.marker, part.text) for part in side] for side in sides))
                yield EncodingFault("ML521" if marker == "<s>" else "ML553", found)
            else:
                yield self._turn_fault(marker, "is there once too often: a turn more, or one that is cut in two")

    def _turn_fault(self, marker: str, found: str) -> EncodingFault:
        """Return the fault of a turn too few or too many; tools in another place look like one of each."""
        expected_count, found_count = (sum(p.marker == marker for p in side) for side in (self.expected, self.found))
        if expected_count == found_count and any(part.marker == "[AVAILABLE_TOOLS]" for part in self.found):
            return EncodingFault("ML530", f"the tools stand on the other side of {marker or 'a text'}")
        return EncodingFault("ML533", f"{marker or 'a text'} {found}")

    def _pair_faults(self, expected: MarkedText, found: MarkedText) -> Iterator[EncodingFault]:
        """Yield the class of two texts after the same control token."""
        want, have = expected.text, found.text
        after = f"after {expected.marker or 'the start'}"
        # the first characters that differ, with 20 on each side
        at = equal_beginning(want, have)
        around = slice(max(0, at - 20), at + 20)
        shown = f"{after}: {have[around]!r}, expected {want[around]!r}"
        if not have.strip() and expected.marker in _BEFORE_ANSWERS:
            shown = f"{after}: the answer is empty, expected {want[around]!r}"
        padded_texts = [text.strip() for text in self._texts() if text != text.strip() and text.strip()]
        has_own_whitespace = any(text in want for text in padded_texts)
        if want == have:
            yield EncodingFault("ML532", f"{after}: same text, different ids")
        elif reason := text_reason(want, have, after):
            yield reason
        elif want.strip() == have.strip():
            yield EncodingFault("ML529" if has_own_whitespace else "ML528", shown)
        # the text of a tool's result is the row's own; calls and tools are written by the template
        elif expected.marker in _TOOLS and expected.marker != "[/TOOL_RESULTS]":
            yield EncodingFault("ML530", shown)
        elif without_spaces(want) != without_spaces(have):
            yield from self._word_faults(expected.marker, want, have, shown)
        elif has_own_whitespace:
            yield EncodingFault("ML529", shown)
        elif any(message["role"] == following["role"] for message, following in pairwise(self.row.messages)):
            yield EncodingFault("ML533", f"messages are joined in another way, {shown}")
        else:
            yield EncodingFault("ML528" if any(prompt in want for prompt in self._prompts) else "ML529", shown)

    def _word_faults(self, marker: str, want: str, have: str, shown: str) -> Iterator[EncodingFault]:
        """Yield the classes of two texts with other words: system prompts first, then the rest without them."""
        moved = [p for p in self._prompts if want.count(p) != have.count(p)]
        if not moved:
            # a prompt that only moved within the same text also explains the difference
            rest = [(p, want.replace(p, "", 1), have.replace(p, "", 1)) for p in self._prompts if p in want]
            moved = [
                prompt
                for prompt, expected_rest, found_rest in rest
                if without_spaces(expected_rest) == without_spaces(found_rest)
            ]
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
        # a text before the text, or after the system prompt; empty if they differ by more
        want, have, extra = want.strip(), have.strip(), ""
        for start in ("", *self._prompts):
            end = want.removeprefix(start).strip()
            if want.startswith(start) and have.startswith(start) and have.endswith(end):
                extra = have.removeprefix(start).removesuffix(end).strip()
                break
        row_texts = repr(self.row.to_json()) + "".join(self._texts())
        if extra and marker in _USER and extra not in row_texts:
            found = f"a text that the row does not have stands in front: {extra[:60]!r}"
            yield EncodingFault("ML527", found)
        else:
            yield _other_words(want, have, shown)


def _other_words(want: str, have: str, shown: str) -> EncodingFault:
    """Return the fault of a text with other words than the row's, without a system prompt or a text in front."""
    tight = without_spaces(want)
    if tight and without_spaces(have) == 2 * tight:
        fix = "Look for a prompt that is put in front of messages which have it already: give one of them."
        return EncodingFault("ML534", f"{shown}: the text is there twice", fix=fix)
    head, tail = common_ends(want, have)
    if head and tail and head + tail == len(have):
        fix = "Look for a cut that keeps both ends of a long text, or for a filter that takes a part out of it."
        lost = len(want) - len(have)
        return EncodingFault("ML534", f"{shown}: {lost} characters are missing from the middle", fix=fix)
    return EncodingFault("ML534", shown)


def _main_markers(run: Sequence[MarkedText]) -> list[str]:
    """Return the markers of a run, without the EOS of a whole missing or surplus turn."""
    markers = [part.marker for part in run]
    inner = [marker for marker in markers if marker != "</s>"]
    return list(dict.fromkeys(inner or markers))
