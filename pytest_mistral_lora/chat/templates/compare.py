"""Compare the two backends on a row or a prompt: equal, equal but for named deviations, or different."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pytest_mistral_lora.chat.diff import (
    MarkedText,
    align_controls,
    common_ends,
    equal_beginning,
    join_parts,
    units_shape,
)
from pytest_mistral_lora.chat.encoded import EncodedRow, Span
from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.chat.oracle import VERSION, Oracle
from pytest_mistral_lora.chat.oracle.versions import VersionFacts
from pytest_mistral_lora.chat.pieces import plain_text
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates.chat_template import REFUSES, ChatTemplate
from pytest_mistral_lora.chat.templates.deviations import DEVIATIONS, Deviation
from pytest_mistral_lora.chat.templates.faults import FAULTS, Side, TemplateFault
from pytest_mistral_lora.chat.templates.generation_blocks import ids_of
from pytest_mistral_lora.errors import OracleRejection, RenderError, RowError

_Ids = tuple[int, ...]
_Labelled = tuple[_Ids, _Ids | None]
"""The ids of a side, with its labels or None."""
_MOST_IDS = 16
_IDS_BEFORE = 4
_CONTROL_SIZE = 20
"""A control token counts as so many characters of text."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference of a row that no named deviation explains.

    Attributes:
        found: The difference in words.
        shape: Its shape, the same for each row that one fault changes; empty if it has none.
        fault: The name of the fault in the table of `faults`; empty if no named fault causes it.
        sides: The ids with and without this difference alone; None for those of the whole comparison.
        size: The number of characters and control tokens that differ: it shows whether a change reduces the difference.
    """

    found: str
    shape: str = ""
    fault: str = ""
    sides: tuple[_Ids, _Ids] | None = None
    size: int = 0


@dataclass(frozen=True, slots=True)
class Explanation:
    """The reasons why the ids of a row differ.

    Attributes:
        deviations: Ids of the named deviations, sorted.
        differences: The differences that they leave.
    """

    deviations: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()

    @property
    def causes(self) -> tuple[Difference, ...]:
        """The first difference of each cause: a row of many turns may show one fault in each of them."""
        first: dict[str, Difference] = {}
        for difference in self.differences:
            first.setdefault(difference.shape or difference.found, difference)
        return tuple(first.values())

    @property
    def size(self) -> int:
        """The size of all differences."""
        return sum(difference.size for difference in self.differences)


@dataclass(frozen=True, slots=True)
class BackendComparison:
    """The encodings of one row by the two backends, and the deviations that explain a difference.

    Attributes:
        oracle: mistral-common's encoding: of the row behind the template's own system prompt, if it has none and the
            template writes one.
        template: The chat template's encoding, or None if the template refuses the row.
        deviations: Ids of the named deviations that explain the difference, sorted; empty if the ids are equal.
        differences: The first difference of each cause that no named deviation explains; empty if none is left.
        refusal: The kind of the template's error (`RenderError.kind`); empty if it renders the row.
        own_prompt: Whether the row is compared behind the template's own system prompt.
    """

    oracle: EncodedRow
    template: EncodedRow | None
    deviations: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    refusal: str = ""
    own_prompt: bool = False

    @property
    def equal(self) -> bool:
        """Whether both backends give the same ids."""
        return self.template is not None and self.template.input_ids == self.oracle.input_ids

    def sides_of(self, difference: Difference) -> tuple[_Labelled, _Labelled] | None:
        """Return ids and labels of both sides that show a difference; None if the template refuses the row.

        The first difference is shown in the whole row, unless it is a named fault; any other one by itself.
        """
        is_whole = difference.sides is None or (not difference.fault and difference is self.differences[0])
        if is_whole and self.template is not None:
            return (self.oracle.input_ids, self.oracle.labels), (self.template.input_ids, self.template.labels)
        return None if difference.sides is None else ((difference.sides[0], None), (difference.sides[1], None))

    @property
    def unexplained(self) -> str:
        """The differences in words; empty if no difference is left."""
        return "; ".join(difference.found for difference in self.differences)


def prompts_of(row: Row) -> list[Row]:
    """Return the prompts of a conversation, the longest first: the messages before each answer to a question."""
    settings = row.tools, row.place, row.reasoning_effort, row.response_format
    starts = [group[0] for group in reversed(row.assistant_groups())]
    prompts = (Row(row.messages[:start], *settings) for start in starts if start)
    return [prompt for prompt in prompts if is_prompt(prompt)]


def is_prompt(row: Row) -> bool:
    """Return whether a row ends with a question or the result of a tool, so that an answer follows."""
    return row.messages[-1]["role"] in ("user", "tool")


def compare(
    row: Row | Mapping[str, Any], oracle: Oracle, template: ChatTemplate, *, as_prompt: bool = False
) -> BackendComparison:
    """Compare mistral-common and the chat template on a row, or on a prompt, which has no labels.

    Args:
        row: The row.
        oracle: Mistral's own tokenization.
        template: The template with its tokenizer.
        as_prompt: Whether a row without an answer at its end is a prompt; else it is refused.

    Raises:
        OracleRejection: If mistral-common refuses the row.
    """
    row = as_row(row)
    if is_prompt(row) and not as_prompt:
        oracle.encode(row)  # refuses it
    behind, expected = _behind_own_prompt(row, oracle, template)
    own_prompt = behind is not row
    try:
        actual = _unlabelled(template.ids(row, generation_prompt=True)) if is_prompt(row) else template.encode(row)
    except RowError as error:
        refused = _explain_refusal(row, oracle, template, error)
        kind = error.__cause__.kind if isinstance(error.__cause__, RenderError) else "error"
        return BackendComparison(expected, None, refused.deviations, refused.causes, kind, own_prompt)
    if actual.input_ids == expected.input_ids:
        return BackendComparison(expected, actual, own_prompt=own_prompt)
    found = explain(row, oracle, template)
    return BackendComparison(expected, actual, found.deviations, found.causes, own_prompt=own_prompt)


def _unlabelled(ids: _Ids) -> EncodedRow:
    return EncodedRow(ids, None, (Span(None, None, "text", 0, len(ids), False),))


def _encoded(row: Row, oracle: Oracle) -> EncodedRow:
    return _unlabelled(oracle.encode_prompt(row)) if is_prompt(row) else oracle.encode(row)


OTHER_LAYOUT = "another layout"
"""The shape of the difference of a template that writes none of mistral-common's control tokens."""


@cache  # packaging takes as long to parse a version as we take to encode a row
def _known(facts: VersionFacts, kind: str) -> tuple[Deviation, ...]:
    """Return the deviations that a tokenizer can show under this mistral-common."""
    return tuple(d for d in DEVIATIONS if d.applies(facts=facts, kind=kind, mistral_common=VERSION))


def _behind_own_prompt(row: Row, oracle: Oracle, template: ChatTemplate) -> tuple[Row, EncodedRow]:
    """Return a row behind the template's own system prompt, if mistral-common takes it, else the row; and its encoding.

    Raises:
        OracleRejection: If mistral-common refuses the row itself.
    """
    encoded = _encoded(row, oracle)
    behind = template.behind_own_prompt(row, generation_prompt=is_prompt(row))
    if behind is row:
        return row, encoded
    try:
        return behind, _encoded(behind, oracle)
    except OracleRejection:
        return row, encoded


@dataclass(frozen=True, slots=True)
class _BothSides:
    """A row as both sides see it.

    Attributes:
        row: The row.
        behind: The row for mistral-common: behind the template's own system prompt, if it writes one.
        ids: mistral-common's ids.
        text: The template's rendering.
    """

    row: Row
    behind: Row
    ids: _Ids
    text: str

    def altered_side(self, changed: _BothSides) -> Side | None:
        """Return the side that a changed row differs for; None if it differs for both or neither.

        A change that alters both sides would hide a difference that it does not explain.
        """
        same, renders = changed.ids == self.ids, changed.text == self.text
        if same == renders:
            return None
        return "template" if same else "mistral-common"


def _both_sides(row: Row, oracle: Oracle, template: ChatTemplate) -> _BothSides | None:
    """Return how both sides see a row; None if one of them refuses it."""
    try:
        behind, encoded = _behind_own_prompt(row, oracle, template)
        return _BothSides(row, behind, encoded.input_ids, template.render(row, generation_prompt=is_prompt(row)))
    except RowError:
        return None


def _explain_refusal(row: Row, oracle: Oracle, template: ChatTemplate, error: RowError) -> Explanation:
    """Explain a row that the template refuses: by the changes that make it accept the row, and the differences left."""
    if isinstance(error.__cause__, RenderError) and error.__cause__.kind != "error":
        # not a refusal: the template exceeds a bound, or has several texts for one row
        return Explanation((), (Difference(error.found),))
    deviations: set[str] = set()
    differences: list[Difference] = []
    causes: list[Deviation | TemplateFault] = [*(d for d in _known(oracle.facts, oracle.kind) if d.refusal), *FAULTS]
    untried = iter(causes)
    while (cause := next(untried, None)) is not None:
        # the words of a deviation are no proof: the row must have what it is about, and be right without it
        if isinstance(cause, Deviation) and not re.search(cause.refusal, error.found):
            continue
        changed = cause.changed(row, oracle.facts)
        if changed is None:
            continue
        next_error: RowError | None = None
        try:
            _encoded(changed, oracle)
            template.render(changed, generation_prompt=is_prompt(changed))
        except OracleRejection:
            continue
        except RowError as other:
            if _without_quotes(other.found) == _without_quotes(error.found):
                continue
            next_error = other
        if isinstance(cause, Deviation):
            deviations.add(cause.id)
        else:
            found = f"{cause.words}: {error.found.removeprefix(REFUSES)}"
            differences.append(Difference(found, cause.id, cause.id))
        if next_error is None:
            rest = explain(changed, oracle, template)
            return Explanation(tuple(sorted(deviations | {*rest.deviations})), (*differences, *rest.differences))
        # the next refusal has another cause
        row, error = changed, next_error
        causes.remove(cause)
        untried = iter(causes)
    refused = Difference(error.found, _without_quotes(error.found))
    return Explanation(tuple(sorted(deviations)), (*differences, refused))


def _without_quotes(refusal: str) -> str:
    """Return a refusal without the texts and numbers of a row."""
    return re.sub(r"[0-9]+", "#", re.sub(r"'[^']*\s[^']*'|\"[^\"]*\s[^\"]*\"", "'…'", refusal))


def explain(row: Row, oracle: Oracle, template: ChatTemplate) -> Explanation:
    """Explain the difference of a row that mistral-common and the template both encode, if their ids differ."""
    view = _both_sides(row, oracle, template)
    if view is None:
        return Explanation((), (Difference("the row is refused"),))
    if view.ids == ids_of(template.tokenizer, [view.text])[0]:
        return Explanation()
    deviations: set[str] = set()
    for deviation in _known(oracle.facts, oracle.kind):
        deviating = None if deviation.refusal else deviation.changed(view.row, oracle.facts)
        changed = None if deviating is None else _both_sides(deviating, oracle, template)
        if changed is not None and view.altered_side(changed):
            deviations.add(deviation.id)
            view = changed
    left = _compare_parts(view, oracle, template)
    named: list[Difference] = []
    for fault in FAULTS:
        changed_row = fault.changed(view.row, oracle.facts) if left.differences and fault.sides else None
        changed = None if changed_row is None else _both_sides(changed_row, oracle, template)
        if changed is None or view.altered_side(changed) not in fault.sides:
            continue
        rest = _compare_parts(changed, oracle, template)
        # a named deviation may have explained every difference that it changes
        if rest.size >= left.size:
            continue
        is_ignored = view.altered_side(changed) == "mistral-common"
        asks = is_prompt(view.row)
        sides = (view.ids, changed.ids)
        if not is_ignored:
            sides = template.ids(changed.row, generation_prompt=asks), template.ids(view.row, generation_prompt=asks)
        named.append(Difference(fault.words, fault.id, fault.id, sides))
        view, left = changed, rest
    return Explanation(tuple(sorted(deviations | {*left.deviations})), (*named, *left.differences))


def _compare_parts(view: _BothSides, oracle: Oracle, template: ChatTemplate) -> Explanation:
    """Compare the control tokens of a row and the texts between them."""
    try:
        segments = template.segments(view.row, generation_prompt=is_prompt(view.row))
    except RowError as error:
        return Explanation((), (Difference(error.found, _without_quotes(error.found), size=len(error.found)),))
    space = " " if oracle.kind == "spm" else ""
    expected = join_parts(
        (oracle.control_tokens[part.ids[0]] if part.text is None else None, space + (part.text or ""), part.ids)
        for part in oracle.traced_texts(view.behind, as_prompt=is_prompt(view.behind))
    )
    actual = join_parts((part.text if part.control else None, part.text, part.ids) for part in segments)
    parts = _PartsComparison(view.row, oracle, template, expected, actual)
    differences = tuple(parts.differences())
    return Explanation(tuple(sorted(parts.deviations)), differences)


class _PartsComparison:
    """The control tokens and texts of a row, compared with those that mistral-common writes.

    Attributes:
        deviations: Ids of the named deviations that explain a text; filled by `differences`.
    """

    def __init__(
        self,
        row: Row,
        oracle: Oracle,
        template: ChatTemplate,
        expected: list[MarkedText],
        actual: list[MarkedText],
    ) -> None:
        self.deviations: set[str] = set()
        self._row, self._oracle, self._template = row, oracle, template
        # one more entry than the row has control tokens: the text at the start has none
        self._expected, self._actual = expected, actual
        self._expected_controls = [part.marker for part in expected[1:]]
        self._controls = [part.marker for part in actual[1:]]

    def differences(self) -> Iterator[Difference]:
        """Yield each run of different control tokens, and each unexplained different text between equal ones."""
        want, have = self._expected_controls, self._controls
        if want and not have:
            found = f"it writes none of the control tokens {' '.join(dict.fromkeys(want))}"
            yield Difference(found, OTHER_LAYOUT, size=_CONTROL_SIZE * len(want))
            return
        predicted = self._predicted_texts()
        for code, i, i_end, j, j_end in align_controls(want, have):
            if code != "equal":
                found = f"control tokens {' '.join(have)}; expected {' '.join(want)}"
                size = _CONTROL_SIZE * (i_end - i + j_end - j)
                yield Difference(found, units_shape("", want[i:i_end], have[j:j_end]), size=size)
                continue
            # the texts between the equal tokens, and those at both ends of the row
            first = 0 if i == j == 0 else 1
            last = i_end - i + ((i_end, j_end) == (len(want), len(have)))
            for n in range(first, last):
                difference = self._text_difference(i + n, j + n, predicted.get(j + n, {}))
                if difference is not None:
                    yield difference

    def _predicted_texts(self) -> dict[int, dict[str, str]]:
        """Return the texts that deviations predict, by the number of the text in the rendering."""
        oracle, controls = self._oracle, self._controls
        space = " " if oracle.kind == "spm" else ""
        predicted: dict[int, dict[str, str]] = {}
        for deviation in _known(oracle.facts, oracle.kind):
            if deviation.predict is None:
                continue
            anchor = next((control for control in reversed(deviation.after) if control in controls), None)
            places = [n + 1 for n, control in enumerate(controls) if control == anchor]
            texts = deviation.predict(self._row, oracle.facts)
            # v2 leaves out the tool turns before the last user message, so the texts are matched from the end.
            for place, text in zip(reversed(places), reversed(texts), strict=False):
                predicted.setdefault(place, {})[deviation.id] = space + text
        return predicted

    def _text_difference(self, index: int, have_index: int, predicted: Mapping[str, str]) -> Difference | None:
        want, have = self._expected[index], self._actual[have_index]
        if (want.text, want.ids) == (have.text, have.ids):
            return None
        before, after = want.marker, self._expected_controls[index : index + 1]
        names = _explain_text(self._oracle, self._template, want, have, (before, after), predicted)
        if names is not None:
            self.deviations |= names
            return None
        shown = before or "the start"
        words = f"after {shown}: {_excerpt(self._oracle, have, want)}; expected {_excerpt(self._oracle, want, have)}"
        size = max(1, len(want.text) + len(have.text) - 2 * sum(common_ends(want.text, have.text)))
        return Difference(words, units_shape(shown, want.text, have.text), sides=(want.ids, have.ids), size=size)


def _excerpt(oracle: Oracle, part: MarkedText, other: MarkedText) -> str:
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
    want: MarkedText,
    have: MarkedText,
    around: tuple[str, list[str]],
    predicted: Mapping[str, str],
) -> set[str] | None:
    """Return the deviations that explain one text between the control tokens `around` it, or None."""
    before, after = around
    known = {deviation.id for deviation in _known(oracle.facts, oracle.kind)}
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


def _ids_are_right(oracle: Oracle, have: MarkedText, want: MarkedText) -> bool:
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
