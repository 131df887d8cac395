"""The class of a difference between two lists of parts: control tokens that are missing or too many, other texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.encoded.parts import Fault, Hunk, Part, hunks, squeezed

_TOOLS = (
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CONTENT]",
    "[ARGS]",
    "[CALL_ID]",
)
_SYSTEM = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
_USER = ("[INST]", *_SYSTEM, "")


def part_faults(row: Row, expected: Sequence[Part], found: Sequence[Part]) -> Iterator[Fault]:
    """Yield the rules that a difference breaks, with what was found; a rule may come more than once.

    Args:
        row: The chat row.
        expected: mistral-common's parts of the row.
        found: The trainer's; they differ from `expected`.
    """
    yield from _Judge(row, tuple(expected), tuple(found)).faults()


@dataclass(frozen=True)
class _Judge:
    row: Row
    expected: tuple[Part, ...]
    found: tuple[Part, ...]

    def faults(self) -> Iterator[Fault]:
        written = sorted(self._written)
        if written:
            yield Fault("ML524", f"{', '.join(written)} is there as text, not as control token")
            return
        for hunk in hunks(self.expected, self.found):
            yield from self._hunk(hunk)

    @cached_property
    def _written(self) -> set[str]:
        """Control tokens that are missing, and whose literals are text more often than they should be."""
        missing = Counter(part.marker for part in self.expected)
        missing.subtract(Counter(part.marker for part in self.found))
        return {
            marker
            for marker, count in missing.items()
            if marker and count > 0 and self._literals(self.found, marker) > self._literals(self.expected, marker)
        }

    def _literals(self, parts: Sequence[Part], marker: str) -> int:
        return sum(part.text.count(marker) for part in parts)

    @cached_property
    def _said(self) -> str:
        """Everything that the row says, as one text."""
        return repr(self.row.to_json()) + "".join(self._texts())

    def _texts(self, role: str = "") -> list[str]:
        return [text_of(m.get("content")) for m in self.row.messages if role in ("", m["role"])]

    @cached_property
    def _prompts(self) -> list[str]:
        return [text.strip() for text in self._texts("system") if text.strip()]

    def _hunk(self, hunk: Hunk) -> Iterator[Fault]:
        if squeezed(_spelled(hunk.expected)) == squeezed(_spelled(hunk.found)) and hunk.surplus:
            yield from self._injections(hunk)
            return
        structure = [fault for run in hunk.missing for fault in self._missing(run)]
        structure += [fault for run in hunk.surplus for fault in self._surplus(run)]
        yield from structure
        if structure and squeezed(_texts_of(hunk.expected)) == squeezed(_texts_of(hunk.found)):
            return
        for expected, found in hunk.pairs:
            yield from self._pair(expected, found)

    def _injections(self, hunk: Hunk) -> Iterator[Fault]:
        markers = sorted({part.marker for run in hunk.surplus for part in run})
        yield Fault("ML523", f"text became the control token {', '.join(markers)}")

    def _missing(self, run: tuple[Part, ...]) -> Iterator[Fault]:
        for marker in _main_markers(run):
            if marker in _TOOLS:
                yield Fault("ML530", f"{marker} is missing")
            elif marker in _SYSTEM:
                yield self._lost_prompt(f"{marker} is missing")
            elif marker in ("<s>", "</s>"):
                yield Fault("ML521" if marker == "<s>" else "ML522", f"a {marker} is missing")
            else:
                lost = "is missing: a turn is lost, joined with another, or written without it"
                yield self._other_turns(marker, lost)

    def _surplus(self, run: tuple[Part, ...]) -> Iterator[Fault]:
        for marker in _main_markers(run):
            if marker and self._literals(self.found, marker) < self._literals(self.expected, marker):
                yield Fault("ML523", f"text became the control token {marker}")
            elif marker == "<unk>":
                yield Fault("ML532", "text became <unk>: it was encoded with another vocabulary")
            elif marker in _TOOLS:
                yield Fault("ML530", f"{marker} is there once too often")
            elif marker in _SYSTEM:
                yield self._new_prompt(_texts_of(run))
            elif marker in ("<s>", "</s>"):
                yield Fault("ML521" if marker == "<s>" else "ML522", f"a {marker} is there that does not belong there")
            else:
                yield self._other_turns(marker, "is there once too often: a turn more, or one that is cut in two")

    def _other_turns(self, marker: str, found: str) -> Fault:
        """Return what is wrong with the turns; where there are as many, tools that stand elsewhere look like it."""
        expected_count, found_count = (sum(p.marker == marker for p in side) for side in (self.expected, self.found))
        if expected_count == found_count and any(part.marker == "[AVAILABLE_TOOLS]" for part in self.found):
            return Fault("ML530", f"the tools stand on the other side of {marker or 'a text'}")
        return Fault("ML533", f"{marker or 'a text'} {found}")

    def _lost_prompt(self, found: str) -> Fault:
        said = squeezed(_texts_of(self.found))
        if self._prompts and all(squeezed(prompt) in said for prompt in self._prompts):
            return Fault("ML526", f"{found}: the system prompt stands elsewhere")
        return Fault("ML525", f"{found}: the system prompt is not there")

    def _new_prompt(self, text: str) -> Fault:
        if any(squeezed(prompt) in squeezed(text) for prompt in self._prompts):
            return Fault("ML526", "the system prompt has a block of its own")
        return Fault("ML527", f"a system prompt that the row does not have: {text.strip()[:60]!r}")

    def _pair(self, expected: Part, found: Part) -> Iterator[Fault]:
        want, have = expected.text, found.text
        after = f"after {expected.marker or 'the start'}"
        shown = f"{after}: {_edges(want, have)}"
        if want == have:
            yield Fault("ML532", f"{after}: the text is right, and its ids are others")
        elif want.strip() == have.strip():
            yield Fault(("ML529" if self._has_own_whitespace(want) else "ML528"), shown)
        elif expected.marker in _TOOLS and expected.marker != "[/TOOL_RESULTS]":
            yield Fault("ML530", shown)
        elif squeezed(want) == squeezed(have):
            yield from self._inner_whitespace(want, shown)
        else:
            yield from self._words(expected.marker, want, have, shown)

    def _has_own_whitespace(self, text: str) -> bool:
        """Return whether a message that is in a text begins or ends with whitespace."""
        own = [said for said in self._texts() if said != said.strip() and said.strip()]
        return any(said.strip() in text for said in own)

    def _inner_whitespace(self, want: str, shown: str) -> Iterator[Fault]:
        joined = any(one["role"] == two["role"] for one, two in pairwise(self.row.messages))
        if self._has_own_whitespace(want):
            yield Fault("ML529", shown)
        elif joined:
            yield Fault("ML533", f"messages are joined in another way, {shown}")
        else:
            yield Fault(("ML528" if any(prompt in want for prompt in self._prompts) else "ML529"), shown)

    def _words(self, marker: str, want: str, have: str, shown: str) -> Iterator[Fault]:
        prompts = [p for p in self._prompts if want.count(p) != have.count(p)] or self._moved_within(want, have)
        if prompts:
            yield from self._moved(prompts, want, have)
            for prompt in prompts:
                more = want.count(prompt) - have.count(prompt)
                want = want if more < 0 else want.replace(prompt, "", 1)
                have = have if more > 0 else have.replace(prompt, "", 1)
            if squeezed(want) == squeezed(have):
                return
        extra = self._put_in_front(want, have)
        if extra and marker in _USER and extra not in self._said:
            yield Fault("ML527", f"a text that the row does not have stands in front: {extra[:60]!r}")
        else:
            yield Fault("ML534", shown)

    def _put_in_front(self, want: str, have: str) -> str:
        """Return what stands in front of a text, or between the system prompt and it; empty where that is not all."""
        want, have = want.strip(), have.strip()
        for start in ("", *self._prompts):
            rest = want.removeprefix(start).strip()
            if want.startswith(start) and have.startswith(start) and have.endswith(rest):
                return have.removeprefix(start).removesuffix(rest).strip()
        return ""

    def _moved_within(self, want: str, have: str) -> list[str]:
        """Return the system prompts that explain a difference by standing elsewhere in the same text."""
        rest = [(p, want.replace(p, "", 1), have.replace(p, "", 1)) for p in self._prompts if p in want]
        return [prompt for prompt, one, two in rest if squeezed(one) == squeezed(two)]

    def _moved(self, prompts: list[str], want: str, have: str) -> Iterator[Fault]:
        for prompt in prompts:
            there = _texts_of(self.found).count(prompt)
            if prompt in have or there >= _texts_of(self.expected).count(prompt):
                yield Fault("ML526", f"the system prompt {prompt[:60]!r} stands elsewhere")
            else:
                yield Fault("ML525", f"the system prompt {prompt[:60]!r} is not there")


def _main_markers(run: Sequence[Part]) -> list[str]:
    """Return the markers of a run of parts, without the EOS of a turn that is there as a whole."""
    markers = [part.marker for part in run]
    inner = [marker for marker in markers if marker != "</s>"]
    return list(dict.fromkeys(inner or markers))


def _spelled(parts: Sequence[Part]) -> str:
    return "".join(part.spelled for part in parts)


def _texts_of(parts: Sequence[Part]) -> str:
    return "\n".join(part.text for part in parts)


def _edges(want: str, have: str) -> str:
    """Return how two texts differ, in short: the first characters that differ and what surrounds them."""
    at = next((n for n, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), min(len(want), len(have)))
    start = max(0, at - 20)
    return f"{have[start : at + 20]!r}, expected {want[start : at + 20]!r}"
