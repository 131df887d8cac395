"""A chat template as the cause of the differences of encoded rows: shown by encoding the rows by that template."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby
from typing import ClassVar

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, Span
from pytest_mistral_lora.chat.objective import ANSWERS, Objective
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.generation_blocks import offsets_of
from pytest_mistral_lora.chat.templates.read_rendered import RenderedReader
from pytest_mistral_lora.conformance.encoded.integers import Ids
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine
from pytest_mistral_lora.conformance.encoded.read_lines import LineStretch, stretches_of
from pytest_mistral_lora.conformance.encoded.row_faults import cut_fault
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.model_targets import TrainerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import MistralLoraError, RowError

_MOST_TRIES = 20
"""Lines to encode by a template that explains none of them."""


@dataclass
class ExplainedFindings:
    """The findings that a cause explains.

    Attributes:
        first: The first of them, by their rules.
        counts: Their number, by their rules.
    """

    first: dict[str, Finding] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def take(self, before: Sequence[Finding], after: Sequence[Finding]) -> None:
        """Count the findings of an explained line that come from the cause.

        Args:
            before: The findings of the line.
            after: Those that the line would have without the cause.
        """
        independent = {finding.rule for finding in after}
        for finding in before:
            if finding.rule not in independent:
                self.counts[finding.rule] += 1
                self.first.setdefault(finding.rule, finding)

    def extend(self, other: ExplainedFindings) -> None:
        """Add the findings of later lines."""
        self.counts.update(other.counts)
        self.first = {**other.first, **self.first}


@dataclass(kw_only=True)
class Cause:
    """What other findings of a file are shown to come from.

    Attributes:
        rule: The rule of the finding about the cause itself.
        case: The check of encoded rows that reports it.
        judge: Returns that finding; None if the cause has no fault.
        is_reported: Whether another check reports that finding, so that the rows need not.
    """

    rule: ClassVar[str]
    case: ClassVar[str]
    judge: Callable[[], Finding | None]
    is_reported: bool = False

    @cached_property
    def finding(self) -> Finding | None:
        """The finding about the cause; None if it has no fault."""
        return self.judge()

    def findings(self, explained: ExplainedFindings) -> Iterator[Finding]:
        """Yield the findings of the file: the one about the cause with the number of those that it explains, or these.

        If another check reports it, they name it as their cause.
        """
        if not explained.counts or self.finding is None:
            return
        if not self.is_reported:
            yield replace(self.finding, covers=tuple(sorted(explained.counts.items())))
            return
        for rule, finding in explained.first.items():
            yield replace(finding, more=explained.counts[rule] - 1, effect_of=self.finding.rule)


@dataclass(kw_only=True)
class TemplateCause(Cause):
    """The chat template of a tokenizer, and the differences of a file that it makes.

    A line is explained if the template gives its conversations exactly the line's ids, perhaps cut. Its labels are then
    compared with the answers as the template writes them, so that a fault beside the template's is found, too.

    Attributes:
        load: Returns the template; it may raise an error of this project.
    """

    rule = "ML004"
    case = "ids"

    load: Callable[[], ChatTemplate]
    _tries: int = _MOST_TRIES

    def begin(self) -> None:
        """Begin a part of a file: each part has tries of its own, so that its verdict depends on no other part."""
        self._tries = _MOST_TRIES

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The template; None if it does not load, which another check reports."""
        with suppress(MistralLoraError):
            return self.load()
        return None

    @cached_property
    def _reader(self) -> RenderedReader:
        return RenderedReader(self._loaded)

    @property
    def _loaded(self) -> ChatTemplate:
        if self.template is None:
            raise ValueError("the template does not load")
        return self.template

    def encode(
        self, line: EncodedLine, oracle: Oracle, objective: Objective = ANSWERS
    ) -> tuple[EncodedLine, tuple[EncodedRow, ...]] | None:
        """Return a line with its conversations, and each as the template encodes it; None if it has other ids.

        Args:
            line: The line, with its conversations or with ids alone.
            oracle: Mistral's own tokenization.
            objective: The declared objective of conversations that are read back.
        """
        if self._tries <= 0 or self.template is None:
            return None
        stretches = [*stretches_of(line, oracle)]
        rows: Sequence[Row | None] = line.rows or (None,) * len(stretches)
        if len(rows) != len(stretches):
            return None
        pairs = zip(rows, stretches, strict=True)
        found = [self._encode_stretch(row, stretch, oracle, objective) for row, stretch in pairs]
        encoded = [pair for pair in found if pair is not None]
        if len(encoded) < len(found) or self.finding is None:
            self._tries -= 1
            return None
        self._tries = _MOST_TRIES
        conversations = tuple(row for row, _ in encoded)
        line = replace(line, rows=conversations, packed=line.packed or len(conversations) > 1)
        return line, tuple(one for _, one in encoded)

    def _encode_stretch(
        self, row: Row | None, stretch: LineStretch, oracle: Oracle, objective: Objective
    ) -> tuple[Row, EncodedRow] | None:
        rows = [row] if row is not None else [replace(one, objective=objective) for one in self._read(stretch, oracle)]
        for conversation in rows:
            encoded = self._encode_row(conversation, stretch, oracle)
            if encoded is not None:
                return conversation, encoded
        return None

    def _read(self, stretch: LineStretch, oracle: Oracle) -> list[Row]:
        """Return the conversations that the template may have rendered to some ids."""
        ids = stretch.ids
        # a trainer may put BOS in front and EOS behind
        without = ids[ids[:1] == (oracle.bos_id,) : len(ids) - (ids[-1:] == (oracle.eos_id,))]
        # as the tokenizer of the template writes them, with the markers that it knows
        decode = self._loaded.tokenizer.decode
        texts = [decode(list(part), clean_up_tokenization_spaces=False) for part in dict.fromkeys((ids, without))]
        return [replace(row, place=stretch.place) for text in texts for row in self._reader.read(text)]

    def _encode_row(self, row: Row, stretch: LineStretch, oracle: Oracle) -> EncodedRow | None:
        """Return a row as the template encodes it, if these are the ids of a stretch, perhaps cut; else None."""
        try:
            text = self._loaded.render(row)
            answers = self._answers(row, text)
        except RowError:
            return None
        [(ids, offsets)] = offsets_of(self._loaded.tokenizer, [text])
        # a trainer may put BOS in front and EOS behind
        front = (oracle.bos_id,) if stretch.ids[:1] == (oracle.bos_id,) != ids[:1] else ()
        end = (oracle.eos_id,) if stretch.ids[-1:] == (oracle.eos_id,) != ids[-1:] else ()
        whole = (*front, *ids, *end)
        if whole != stretch.ids and cut_fault(whole, stretch.ids, oracle) is None:
            return None
        owners = _owners(answers, offsets) if answers is not None else [None] * len(ids)
        return _encoded(whole, [None] * len(front) + owners + [None] * len(end), stretch.labels, row.objective)

    def _answers(self, row: Row, text: str) -> list[_MessagePart] | None:
        """Return the parts of a rendering that are a message's own text; None if they cannot be told apart."""
        # where a thought or a call begins and ends in another layout is not known
        if row.objective.without:
            return None
        trains_all, weights = row.objective.turns == "everything", row.trained_weights()
        parts = []
        for number, message in enumerate(row.messages):
            is_answer = message["role"] == "assistant"
            before = self._rendered(replace(row, messages=row.messages[:number]), generation_prompt=is_answer)
            through = self._rendered(replace(row, messages=row.messages[: number + 1]))
            if not (text.startswith(before) and text.startswith(through) and len(before) <= len(through)):
                return None
            content = text_of(message.get("content")).strip()
            at = text.find(content, len(before), len(through)) if content else -1
            end = at + len(content) if at >= 0 else len(through)
            start = len(before) if is_answer or at < 0 else at
            is_trained = bool(weights[number]) or (trains_all and not is_answer)
            parts.append(_MessagePart(number, message["role"], start, end, is_trained))
        return parts

    def _rendered(self, row: Row, *, generation_prompt: bool = False) -> str:
        return self._loaded.render(row, generation_prompt=generation_prompt) if row.messages else ""


def cause_of(target: Target | None) -> TemplateCause | None:
    """Return the template that rows of a target may be encoded by; None if it has none."""
    if isinstance(target, TrainerTarget):
        if not target.has_template:
            return None
        return TemplateCause(
            load=lambda: target.template, judge=target.template_finding, is_reported=target.reports_template
        )
    # the template of a single file is mistral-common's
    may_differ = target is not None and (target.is_in_memory or target.checkpoint is not None)
    if target is None or not may_differ or not target.tokenizer.has_template:
        return None
    return TemplateCause(load=lambda: target.template, judge=partial(_finding_of_folder, target))


def _finding_of_folder(target: Target) -> Finding | None:
    from pytest_mistral_lora.conformance.base_tokenizer import loaded_template_result
    from pytest_mistral_lora.conformance.template import template_file

    place = template_file(target)
    found = loaded_template_result(target.tokenizer, target.template.source, None, place).findings
    write = "`mistral-lora template --tokenizer {checkpoint} --output {template}`"
    fix = f"Write the template that mistral-common generates, {write}, and encode the rows again."
    return found[0].under("ML004", fix=fix) if found else None


@dataclass(frozen=True, slots=True)
class _MessagePart:
    """The text of a message in a rendering.

    Attributes:
        turn: The number of the message.
        role: Its role.
        start: Its first character.
        end: One past its last character.
        supervised: Whether it is trained on.
    """

    turn: int
    role: str
    start: int
    end: int
    supervised: bool


def _owners(parts: Sequence[_MessagePart], offsets: Sequence[tuple[int, int]]) -> list[_MessagePart | None]:
    """Return the message of each token; None for a token of the template."""
    # the parts are in order, and one ends before the next starts
    ends = [part.end for part in parts]
    owners: list[_MessagePart | None] = []
    for start, end in offsets:
        part = next(iter(parts[bisect_right(ends, start) :][:1]), None)
        owners.append(part if part is not None and end > part.start else None)
    return owners


def _encoded(ids: Ids, owners: Sequence[_MessagePart | None], labels: Ids, objective: Objective) -> EncodedRow:
    """Return a row whose messages are trained on or not; what the template writes around them is as the labels are.

    Under `everything`, what it writes around them is trained on.
    """
    spans = []
    trains_rest = objective.turns == "everything" and not objective.without
    trains_all = objective.is_default and sum(label != IGNORE_INDEX for label in labels) >= len(ids) - 1
    for n, owner in enumerate(owners):
        is_trained = trains_rest or (n < len(labels) and labels[n] != IGNORE_INDEX and not trains_all)
        if owner is not None:
            spans.append(Span(owner.turn, owner.role, "text", n, n + 1, owner.supervised))
        else:
            spans.append(Span(None, "assistant" if is_trained else None, "control", n, n + 1, is_trained))
    return EncodedRow.from_spans(ids, _joined(spans))


def _joined(spans: Sequence[Span]) -> Iterator[Span]:
    """Yield the runs of neighbouring spans with one owner."""
    for _, run in groupby(spans, key=lambda span: (*span[:3], span.supervised)):
        first, *others = run
        yield first._replace(end=others[-1].end) if others else first
