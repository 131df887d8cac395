"""The closed table of what can be wrong with encoded rows: each class is one rule, with a name for reports."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import groupby

from pytest_mistral_lora.chat.oracle.mistral_common import Oracle

FILE_CLASSES: Mapping[str, str] = {"ML501": "unreadable-line", "ML507": "row-refused"}
"""Lines that cannot be judged."""

ORDER_CLASSES: Mapping[str, str] = {
    "ML502": "row-dropped",
    "ML503": "row-doubled",
    "ML504": "row-order",
    "ML505": "row-changed",
}
"""The rows of a file against their source."""

TEXT_CLASSES: Mapping[str, str] = {"ML506": "supervised-text-lost"}
"""What a whole file trains on against what its assistants say."""

PACKING_CLASSES: Mapping[str, str] = {
    "ML510": "padding-trained",
    "ML511": "padding-inside",
    "ML512": "position-ids",
    "ML513": "packed-attention-mask",
    "ML514": "packed-boundary-trained",
    "ML515": "packed-conversation-lost",
    "ML516": "packed-order",
}
"""Padding, and several conversations in one sequence."""

ID_CLASSES: Mapping[str, str] = {
    "ML520": "id-out-of-vocabulary",
    "ML521": "bos",
    "ML522": "eos",
    "ML523": "control-token-injection",
    "ML524": "control-token-as-text",
    "ML525": "system-prompt-dropped",
    "ML526": "system-prompt-misplaced",
    "ML527": "system-prompt-invented",
    "ML528": "spacing",
    "ML529": "text-whitespace",
    "ML530": "tool-format",
    "ML531": "truncated",
    "ML532": "other-tokenizer",
    "ML533": "turns",
    "ML534": "text-changed",
    "ML535": "other-conversation",
}
"""`input_ids` against mistral-common's."""

LABEL_CLASSES: Mapping[str, str] = {
    "ML540": "labels-length",
    "ML541": "labels-shifted",
    "ML542": "label-of-another-token",
    "ML543": "everything-trained",
    "ML544": "nothing-trained",
    "ML545": "first-token-masked",
    "ML546": "eos-masked",
    "ML547": "prompt-trained",
    "ML548": "tool-call-marker-masked",
    "ML549": "weight-ignored",
    "ML550": "wrong-span",
    "ML551": "answer-masked",
}
"""`labels` against the assistant's tokens."""

CLASSES: Mapping[str, str] = {
    **FILE_CLASSES,
    **ORDER_CLASSES,
    **TEXT_CLASSES,
    **PACKING_CLASSES,
    **ID_CLASSES,
    **LABEL_CLASSES,
}
"""Every class by its rule."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a row, before it has a place.

    Attributes:
        rule: Id of the rule that is broken, a key of `CLASSES`.
        found: What was found.
        expected: What was expected instead.
    """

    rule: str
    found: str
    expected: str = ""


WINDOW = 300
"""Parts that are compared: enough for a class, and few enough for a row of thousands of turns."""

_V1_MARKER = re.compile(r"(\[/?INST\])")


@dataclass(frozen=True, slots=True)
class Part:
    """A control token and the text up to the next one.

    Attributes:
        marker: The control token as it is written; empty for a text that nothing precedes.
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


@dataclass(frozen=True, slots=True)
class Hunk:
    """A run of parts that differ: what is expected there, and what was found.

    Attributes:
        expected: The expected parts.
        found: The parts found.
        pairs: Parts of equal markers that stand for one another.
        missing: Expected parts without a counterpart, in runs.
        surplus: Found parts without a counterpart, in runs.
    """

    expected: tuple[Part, ...]
    found: tuple[Part, ...]
    pairs: list[tuple[Part, Part]] = field(default_factory=list)
    missing: list[tuple[Part, ...]] = field(default_factory=list)
    surplus: list[tuple[Part, ...]] = field(default_factory=list)


def markers_of(oracle: Oracle) -> dict[int, str]:
    """Return the tokens that part texts: the control tokens and `<unk>`, which no text encodes to."""
    return {oracle.unk_id: "<unk>", **oracle.control_tokens}


def decoded(ids: Sequence[int], oracle: Oracle) -> str:
    """Return the text of ids, its leading space included, which SentencePiece drops at the start of a text."""
    before = oracle.encode_text("a")
    return oracle.decode([*before, *ids]).removeprefix("a") if ids else ""


def parts_of(ids: Sequence[int], oracle: Oracle) -> list[Part]:
    """Return ids in parts; ids outside the vocabulary are not allowed."""
    markers = markers_of(oracle)
    parts = [Part("", "")]
    for is_marker, group in groupby(ids, markers.__contains__):
        run = tuple(group)
        if is_marker:
            parts += [Part(markers[token], "") for token in run]
        elif oracle.version == "v1":
            parts += _v1_parts(parts.pop(), decoded(run, oracle))
        else:
            parts.append(Part(parts.pop().marker, decoded(run, oracle), run))
    return parts if parts[0] != Part("", "") else parts[1:]


def _v1_parts(before: Part, text: str) -> list[Part]:
    first, *rest = _V1_MARKER.split(text)
    return [Part(before.marker, first), *(Part(*pair) for pair in zip(rest[::2], rest[1::2], strict=True))]


def hunks(expected: Sequence[Part], found: Sequence[Part]) -> list[Hunk]:
    """Return where two lists of parts differ, with the parts of each difference matched by their markers.

    Of long lists only the first `WINDOW` parts from the first difference on are compared.
    """
    if [part.marker for part in expected] == [part.marker for part in found]:
        differing = [(one, two) for one, two in zip(expected, found, strict=True) if one != two]
        return [Hunk((one,), (two,), [(one, two)]) for one, two in differing[:WINDOW]]
    start = next((n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), 0)
    one, two = expected[start : start + WINDOW], found[start : start + WINDOW]
    codes = [code for code in SequenceMatcher(None, one, two, autojunk=False).get_opcodes() if code[0] != "equal"]
    if len(codes) > 1 and max(len(expected), len(found)) - start > WINDOW and codes[-1][2] == len(one):
        codes.pop()  # it is made by the end of the window
    return [_matched(tuple(one[a:b]), tuple(two[c:d])) for _, a, b, c, d in codes]


def _matched(expected: tuple[Part, ...], found: tuple[Part, ...]) -> Hunk:
    hunk = Hunk(expected, found)
    markers = [part.marker for part in expected], [part.marker for part in found]
    for tag, a, b, c, d in SequenceMatcher(None, *markers, autojunk=False).get_opcodes():
        if tag == "equal":
            pairs = zip(expected[a:b], found[c:d], strict=True)
            hunk.pairs.extend(pair for pair in pairs if pair[0] != pair[1])
            continue
        hunk.missing.extend([expected[a:b]] if a < b else [])
        hunk.surplus.extend([found[c:d]] if c < d else [])
    return hunk


def squeezed(text: str) -> str:
    """Return a text without its whitespace, nor SentencePiece's sign for a space, which it decodes to one."""
    return "".join(text.replace("▁", " ").split())
