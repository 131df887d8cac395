"""Compare the two backends on a row: equal, equal but for named deviations, or different."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.difference import controls_shape, equal_beginning, plain_text, units_shape
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.oracle import VERSION, Oracle
from pytest_mistral_lora.chat.rows import Row, as_row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.deviations import DEVIATIONS, Deviation
from pytest_mistral_lora.errors import RenderError, RowError

_MOST_IDS = 16
_IDS_BEFORE = 4


@dataclass(frozen=True, slots=True)
class BackendComparison:
    """The encodings of one row by the two backends, and the deviations that explain a difference.

    Attributes:
        oracle: mistral-common's encoding.
        template: The chat template's encoding, or None if the template refuses the row.
        deviations: Ids of the named deviations that explain the difference, sorted; empty if the ids are equal.
        unexplained: The difference that no named deviation explains; empty if none is left.
        refusal: The kind of the template's error (`RenderError.kind`); empty if it renders the row.
        shape: The shape of that difference, the same for each row that one fault changes; empty if it has none.
    """

    oracle: EncodedRow
    template: EncodedRow | None
    deviations: tuple[str, ...] = ()
    unexplained: str = ""
    refusal: str = ""
    shape: str = ""

    @property
    def equal(self) -> bool:
        """Whether both backends give the same ids."""
        return self.template is not None and self.template.input_ids == self.oracle.input_ids


def compare(row: Row | Mapping[str, Any], oracle: Oracle, template: ChatTemplate) -> BackendComparison:
    """Compare mistral-common and the chat template on a row.

    Raises:
        OracleRejection: If mistral-common refuses the row.
    """
    row = as_row(row)
    expected = oracle.encode(row)
    known = _known(oracle.version, oracle.kind)
    try:
        actual = template.encode(row)
    except RowError as error:
        named = [d.id for d in known if d.refusal and re.search(d.refusal, error.found)]
        kind = error.__cause__.kind if isinstance(error.__cause__, RenderError) else "error"
        return BackendComparison(expected, None, tuple(named), "" if named else error.found, kind)
    if actual.input_ids == expected.input_ids:
        return BackendComparison(expected, actual)
    deviations, unexplained, shape = explain(row, oracle, template)
    return BackendComparison(expected, actual, tuple(sorted(deviations)), unexplained, shape=shape)


@cache  # packaging parses a version in as much time as it takes to encode a row
def _known(version: str, kind: str) -> tuple[Deviation, ...]:
    """Return the deviations that a tokenizer can show under this mistral-common."""
    return tuple(d for d in DEVIATIONS if d.applies(version=version, kind=kind, mistral_common=VERSION))


_Explained = tuple[set[str], str, str]
"""Named deviations, the difference that they leave unexplained, and its shape."""


def explain(row: Row, oracle: Oracle, template: ChatTemplate) -> _Explained:
    """Explain the difference of a row that mistral-common and the template both encode, to other ids.

    Returns:
        The named deviations, the difference that they leave unexplained, and its shape.
    """
    known = _known(oracle.version, oracle.kind)
    found: set[str] = set()
    for deviation in known:
        changed = deviation.change(row, oracle.version) if deviation.change else row
        # most changes return the row itself, and rows are compared as JSON
        if changed is row or changed == row:
            continue
        # A change must alter one side only: one that alters both would hide a difference that it does not explain.
        same = oracle.encode(changed).input_ids == oracle.encode(row).input_ids
        renders = template.render(changed) == template.render(row)
        if not same and not renders:
            return found, f"{deviation.id} does not explain the difference", ""
        if not (same and renders):
            found.add(deviation.id)
            row = changed
    try:
        segments = template.segments(row)
    except RowError as error:
        return found, error.found, ""
    space = " " if oracle.kind == "spm" else ""
    expected = _joined(
        (oracle.control_tokens[part.ids[0]] if part.text is None else None, space + (part.text or ""), part.ids)
        for part in oracle.traced_texts(row)
    )
    actual = _joined((part.text if part.control else None, part.text, part.ids) for part in segments)
    return _explain_texts(row, oracle, template, expected, actual, found)


def _explain_texts(
    row: Row, oracle: Oracle, template: ChatTemplate, expected: _Parts, actual: _Parts, found: set[str]
) -> _Explained:
    if expected.controls != actual.controls:
        difference = f"control tokens {' '.join(actual.controls)}; expected {' '.join(expected.controls)}"
        return found, difference, controls_shape(expected.controls, actual.controls)
    space = " " if oracle.kind == "spm" else ""
    # for the text after each control token, the text that each deviation predicts there
    predicted: dict[int, dict[str, str]] = {}
    for deviation in _known(oracle.version, oracle.kind):
        if deviation.predict is None:
            continue
        anchor = next((control for control in reversed(deviation.after) if control in actual.controls), None)
        places = [n + 1 for n, control in enumerate(actual.controls) if control == anchor]
        texts = deviation.predict(row, oracle.version)
        # v2 leaves out the tool turns before the last user message, so the texts are matched from the end.
        for place, text in zip(reversed(places), reversed(texts), strict=False):
            predicted.setdefault(place, {})[deviation.id] = space + text
    for index, (want, have) in enumerate(zip(expected.texts, actual.texts, strict=True)):
        if want == have:
            continue
        names = _explain_text(oracle, template, index, expected, actual, predicted.get(index, {}))
        if names is None:
            after = actual.controls[index - 1] if index else "the start"
            difference = f"after {after}: {_excerpt(oracle, have, want)}; expected {_excerpt(oracle, want, have)}"
            return found, difference, units_shape(after, want.text, have.text)
        found |= names
    return found, "", ""


def _excerpt(oracle: Oracle, part: _TextPart, other: _TextPart) -> str:
    """Return a text with its ids; if it or the other one is long, the tokens around the first that differs."""
    if max(len(part.ids), len(other.ids)) <= _MOST_IDS:
        return f"{part.text!r} {list(part.ids)}"
    start = max(0, equal_beginning(part.ids, other.ids) - _IDS_BEFORE)
    end = start + _MOST_IDS
    text = "".join(plain_text(oracle.piece(token)) for token in part.ids[start:end])
    before, behind = "…" * (start > 0), "…" * (end < len(part.ids))
    ids = ", ".join([*before, *map(str, part.ids[start:end]), *behind])
    return f"{before}{text!r}{behind} [{ids}]"


def _explain_text(
    oracle: Oracle,
    template: ChatTemplate,
    index: int,
    expected: _Parts,
    actual: _Parts,
    predicted: dict[str, str],
) -> set[str] | None:
    """Return the deviations that explain one text, or None."""
    want, have = expected.texts[index], actual.texts[index]
    before, after = expected.controls[index - 1] if index else "", expected.controls[index : index + 1]
    known = {deviation.id for deviation in _known(oracle.version, oracle.kind)}
    names: set[str] = set()
    if have.text != want.text:
        name = next((name for name, prediction in predicted.items() if have.text == prediction), None)
        if name is None and want.text == "" and have.text == " ":
            name = "empty-text-space"
        elif name is None and before == "[/SYSTEM_PROMPT]" and " " + have.text == want.text:
            name = "no-space-after-system"
        elif name is None and after in (["</s>"], ["[TOOL_CALLS]"]) and before != "[TOOL_CALLS]":
            same_words = have.text.rstrip(" ") == want.text.rstrip(" ")
            name = "assistant-trailing-spaces" if same_words else None
        if name is None or name not in known:
            return None
        names.add(name)
    if "control-literal" in known and template.spells_control(have.text):
        return names | {"control-literal"}
    return names if _ids_are_right(oracle, have, want) else None


def _ids_are_right(oracle: Oracle, have: _TextPart, want: _TextPart) -> bool:
    """Return whether a text has the ids that mistral-common gives the same text."""
    if have.text == want.text:
        return have.ids == want.ids
    if oracle.kind == "tekken":
        return have.ids == oracle.encode_text(have.text)
    if not have.text.startswith(" "):
        # mistral-common puts a space before every SentencePiece text, so it cannot encode this one, only decode it.
        return oracle.decode(oracle.encode_text("a") + have.ids) == "a" + have.text
    # A digit does not fuse with the space before it, so the first id of "5" is the space alone.
    return have.ids == (oracle.encode_text(have.text[1:]) or oracle.encode_text("5")[:1])


class _TextPart(NamedTuple):
    """A text with its ids; the text has the space of SentencePiece."""

    text: str
    ids: tuple[int, ...]


class _Parts(NamedTuple):
    """A row as control tokens and the texts around them: one text more than there are control tokens."""

    controls: list[str]
    texts: list[_TextPart]


def _joined(parts: Iterable[tuple[str | None, str, tuple[int, ...]]]) -> _Parts:
    """Return control tokens and texts, of a control token or None, a text and its ids each."""
    controls: list[str] = []
    texts = [_TextPart("", ())]
    for control, text, ids in parts:
        if control is None:
            texts[-1] = _TextPart(texts[-1].text + text, texts[-1].ids + ids)
        else:
            controls.append(control)
            texts.append(_TextPart("", ()))
    return _Parts(controls, texts)
