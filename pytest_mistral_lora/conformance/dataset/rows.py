"""One row of a dataset at a time: encoded as the trainer does, judged, and added to a tally."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import EncodedRow, Policy
from pytest_mistral_lora.chat.reading.chunks import Chunk
from pytest_mistral_lora.chat.rows import Row, read_row
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.dataset.row_findings import (
    beyond,
    changes,
    fault_finding,
    law_findings,
    text_findings,
)
from pytest_mistral_lora.conformance.dataset.tally import DIGEST_BYTES, Tally, packed_place
from pytest_mistral_lora.conformance.finding import Finding, show_difference
from pytest_mistral_lora.errors import NoOracleError, RowError
from pytest_mistral_lora.records.hashing import is_held_out

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.mistral_common import Oracle

_ROW_CHARACTERS = 2000
"""A longer row is not printed with its finding: its place says where it is."""

BEYOND = -1
"""In place of a file's index: the figures of what is beyond `max_length`."""

CHANGED = -2
"""In place of a file's index: how many rows the recipe's policies drop, cut, or keep without a label."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to be known to judge a row, in a form that crosses process boundaries.

    Attributes:
        tokenizer: The tokenizer file or checkpoint folder.
        backend: `mistral-common` or `chat-template`.
        policy: What the recipe does with a row that cannot be trained on as it is.
        held_out: Fraction of the training rows that is held out.
        compares: Whether there is a chat template to compare mistral-common with.
        official: Whether that template is known to be mistral-common's own, so that it needs no bounds.
    """

    tokenizer: Path
    backend: str
    policy: Policy
    held_out: float
    compares: bool
    official: bool = False


class Judge:
    """Judges rows by one tokenizer, as a plan says."""

    def __init__(self, plan: Plan, tokenizer: CheckpointTokenizer | None = None) -> None:
        """Load the tokenizer of the plan, or use the one given."""
        self.plan = plan
        self.encoder = Encoder(plan.backend, tokenizer or CheckpointTokenizer(plan.tokenizer))
        self._oracle = self._find_oracle()
        if plan.official:
            self.encoder.template.bounded = False
        literals = self._oracle.control_tokens.values() if self._oracle else ()
        self._literals = re.compile("|".join(map(re.escape, literals)) or r"(?!)")

    def _find_oracle(self) -> Oracle | None:
        try:
            return self.encoder.tokenizer.oracle
        except NoOracleError:
            if self.plan.backend == "mistral-common":
                raise
            return None

    def chunk(self, chunk: Chunk) -> Tally:
        """Return what there is to know of the lines of a chunk."""
        tally = Tally()
        for number, line in chunk.lines:
            item = read_row(chunk.path, number, line)
            if item is None:
                continue
            try:
                if isinstance(item, RowError):
                    raise item
                encoded = self.plan.policy.apply(self._judge(item, tally)).encoded
            except RowError as error:
                tally.counts[chunk.file, "refused"] += 1
                rule = "ML613" if isinstance(error, _LiteralError) else "ML601"
                tally.findings.add(Finding(rule, error.found, error.place, error.expected, error.next_step))
                continue
            if encoded is None:
                tally.counts[chunk.file, "dropped"] += 1
                continue
            held = chunk.is_held_out or (self.plan.held_out > 0 and is_held_out(item, self.plan.held_out))
            _add(tally, item, encoded, packed_place(chunk.file, number), held)
            _count(tally, chunk.file, item, encoded)
        return tally

    def _judge(self, row: Row, tally: Tally) -> EncodedRow:
        """Encode a row and note what is wrong with it.

        Raises:
            RowError: If mistral-common or the backend refuses it.
        """
        expected = self._oracle.encode(row) if self._oracle else None
        encoded = self._as_trained(row, expected, tally)
        whose = expected or encoded
        cut = self._beyond(row, encoded, whose, tally)
        faults = list(self.plan.policy.faults(encoded, row))
        for fault, error in faults:
            tally.findings.add(fault_finding(fault, error, encoded, cut))
        for change, finding in () if faults else changes(row, encoded, self.plan.policy, cut):
            tally.counts[CHANGED, change] += 1
            tally.findings.add(finding)
        kept = law_findings(row, expected, self._oracle) if expected and self._oracle else ()
        for finding in (*text_findings(row, whose), *kept):
            tally.findings.add(finding)
        if expected is not None and self.plan.compares and not self._agrees(row, expected, encoded, tally):
            return expected
        return encoded

    def _beyond(self, row: Row, encoded: EncodedRow, layout: EncodedRow, tally: Tally) -> dict[str, int]:
        """Return what a cut of the row removes, and add it up; nothing where the row is not too long."""
        length = self.plan.policy.max_length
        if len(encoded.input_ids) <= length:
            return {}
        cut = beyond(row, encoded, layout, length, self._version)
        tally.counts.update({(BEYOND, name): number for name, number in cut.items()})
        return cut

    @property
    def _version(self) -> str:
        return self._oracle.version if self._oracle else ""

    def _as_trained(self, row: Row, expected: EncodedRow | None, tally: Tally) -> EncodedRow:
        """Return what the trainer would train on.

        Raises:
            RowError: If it would refuse the row.
        """
        if self.plan.backend == "mistral-common" and expected is not None:
            literals = self._literals.findall(row.to_jsonl())
            if literals:
                spelled = ", ".join(sorted(set(literals)))
                tally.findings.add(Finding("ML612", f"the text spells {spelled}", row.place))
            return expected
        literals = self.encoder.template.control_literals(row)
        if literals:
            raise _LiteralError(f"the text spells {', '.join(sorted(set(literals)))}", place=row.place)
        return self.encoder.encode(row)

    def _agrees(self, row: Row, expected: EncodedRow, encoded: EncodedRow, tally: Tally) -> bool:
        """Return whether what is trained on has the labels that mistral-common gives; what differs is noted."""
        if self._template_ids(row, None if encoded is expected else encoded) != expected.input_ids:
            self._explain(row, tally)
            return True
        if encoded.labels in (None, expected.labels):
            return True
        tally.findings.add(self._wrong_labels(row, expected, encoded))
        return False

    def _template_ids(self, row: Row, actual: EncodedRow | None) -> tuple[int, ...] | None:
        try:
            return actual.input_ids if actual else self.encoder.template.ids(row)
        except RowError:
            return None

    def _explain(self, row: Row, tally: Tally) -> None:
        from pytest_mistral_lora.chat.templates.compare import compare

        oracle: Any = self._oracle
        try:
            comparison = compare(row, oracle, self.encoder.template)
        except RowError as error:
            what = f"the chat template differs from mistral-common, and the two cannot be compared: {error.found}"
            tally.findings.add(Finding("ML603", what, row.place, row=_shown(row)))
            return
        for name in comparison.deviations:
            tally.add_deviation(name, row.place)
        if comparison.unexplained:
            found = comparison.template
            shown = (comparison.oracle.input_ids, None), (found.input_ids, None) if found else None
            detail = show_difference(shown[0], shown[1], oracle.piece) if shown[1] else ""
            what = f"the chat template differs from mistral-common: {comparison.unexplained}"
            tally.findings.add(Finding("ML603", what, row.place, detail=detail, row=_shown(row)))

    def _wrong_labels(self, row: Row, expected: EncodedRow, actual: EncodedRow) -> Finding:
        oracle: Any = self._oracle
        detail = show_difference((expected.input_ids, expected.labels), (actual.input_ids, actual.labels), oracle.piece)
        what = "the generation blocks mark other tokens than the assistant's"
        return Finding("ML606", what, row.place, detail=detail, row=_shown(row))


class _LiteralError(RowError):
    """A row whose text the chat template would encode as control tokens."""


def _shown(row: Row) -> str:
    text = row.to_jsonl()
    return text if len(text) <= _ROW_CHARACTERS else ""


def _add(tally: Tally, row: Row, encoded: EncodedRow, place: int, held: bool) -> None:
    index = len(tally)
    tally.places.append(place)
    tally.held.append(held)
    tally.tokens.append(len(encoded.input_ids))
    tally.supervised.append(encoded.supervised_tokens)
    prompts, whole = _digests(encoded)
    tally.rows += whole
    for prompt in prompts:
        tally.prompts += prompt
        tally.owners.append(index)


def _digests(encoded: EncodedRow) -> tuple[list[bytes], bytes]:
    """Return a digest of the ids before each turn that is trained on, and one of the whole row with its labels."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    starts = [span.start for span, new in _turn_starts(encoded) if new and span.supervised]
    prompts = []
    end = 0
    for start in starts:
        digest.update(array("q", encoded.input_ids[end:start]).tobytes())
        prompts.append(digest.copy().digest())
        end = start
    digest.update(array("q", encoded.input_ids[end:]).tobytes())
    digest.update(array("q", encoded.labels or ()).tobytes())
    return prompts, digest.digest()


def _turn_starts(encoded: EncodedRow) -> Iterator[tuple[Any, bool]]:
    turn: int | None = None
    for span in encoded.spans:
        yield span, span.turn != turn
        turn = span.turn


def _count(tally: Tally, file: int, row: Row, encoded: EncodedRow) -> None:
    roles = [message["role"] for message in row.messages]
    figures = {
        "rows": 1,
        "tokens": len(encoded.input_ids),
        "supervised_tokens": encoded.supervised_tokens,
        "messages": len(roles),
        "assistant_turns": len(row.assistant_groups()),
        "rows_with_system_prompt": int("system" in roles),
        "rows_with_tools": int(bool(row.tools) or any("tool_calls" in message for message in row.messages)),
    }
    tally.counts.update({(file, name): number for name, number in figures.items()})
