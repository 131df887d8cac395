"""The rules on the rows of a record, which see every source: chat rows, encoded rows, rows read back from ids.

`RowRules` shows each row, and then each record, to the rules. Those without a state are called here; those with one are
the observers of `row_pass`.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from array import array
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.likeness import row_likeness
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.dataset.answers import NO_TOKENIZER, DecodingJudge, JudgedAnswers
from pytest_mistral_lora.conformance.dataset.pairs import LEGITIMATE_IF_UNWANTED, record_digests
from pytest_mistral_lora.conformance.dataset.repeats import has_short_answer, row_sketch
from pytest_mistral_lora.conformance.dataset.row_findings import text_findings
from pytest_mistral_lora.conformance.dataset.texts import spelled_tokens
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.known_programs import observers_of_programs
from pytest_mistral_lora.conformance.row_pass import (
    LOST_IN_IDS,
    OBSERVERS,
    EachRowObserver,
    JudgedRecord,
    JudgedRow,
    Origin,
    RowPass,
    named_observer,
)
from pytest_mistral_lora.conformance.row_table import DIGEST_BYTES, JudgedTable

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


class RowRules:
    """The rules on rows, for one tokenizer.

    Attributes:
        thinks: Whether the tokenizer has control tokens for thinking.
    """

    def __init__(self, oracle: Oracle | None, *, sketches: bool = False) -> None:
        """Prepare the rules.

        Args:
            oracle: The Mistral tokenizer; None if none applies.
            sketches: Whether to make the sketches by which near rows are found.
        """
        self._oracle = oracle
        self._sketches = sketches
        self._answers = None if oracle is None else DecodingJudge(oracle)
        literals = oracle.control_tokens.values() if oracle else ()
        self.thinks: bool = "[THINK]" in literals
        self._literals = re.compile("|".join(map(re.escape, literals)) or r"(?!)")
        self._begin = {literal[:1] for literal in literals} <= {"[", "<"}
        # rule, text and field, without the side, of the findings of the record that is judged
        self._noted: set[tuple[str, str, tuple[str | int, ...]]] = set()
        self._observers = [(name, named_observer(name)) for name in (*OBSERVERS, *observers_of_programs())]
        self._of_rows = [(name, each) for name, each in self._observers if isinstance(each, EachRowObserver)]

    def begin_record(self) -> None:
        """Begin a record: a fault of the prompt of both its sides is reported once."""
        self._noted.clear()

    def once(self, findings: Iterable[Finding], row: Row | None) -> Iterator[Finding]:
        """Yield findings of a row; of both sides of a pair, a fault of their prompt once."""
        if row is None or not row.kind.sides:
            yield from findings
            return
        side = row.kind.side_part(row)
        for finding in findings:
            part = finding.place.part
            noted = (finding.rule, finding.found, part[len(side) :] if part[: len(side)] == side else part)
            if noted not in self._noted:
                self._noted.add(noted)
                yield finding

    def spelled(self, row: Row) -> list[str]:
        """Return the control tokens that a row spells, unless it is about them."""
        text = row.to_jsonl()
        # most rows have no bracket but that of the messages, and a search for it is faster
        own = int(row.kind.is_chat)
        if self._begin and text.count("[") == own and "<" not in text:
            return []
        return spelled_tokens(row, self._literals)

    def observe_row(
        self,
        row: Row,
        layout: EncodedRow,
        expected: EncodedRow | None,
        found: RowPass,
        *,
        origin: Origin = "written",
        spells: bool = True,
    ) -> Iterator[Finding]:
        """Show one row to the rules, and yield its findings.

        Args:
            row: The row.
            layout: Its encoding by mistral-common; without an oracle, by the backend.
            expected: mistral-common's encoding if its answers are to be decoded; else None.
            found: The pass, which looks at the row's record.
            origin: Where its messages come from.
            spells: Whether its texts may spell control tokens: they are letters for this backend.
        """
        if row.converted and row.kind.starts_record(row):
            for words in row.converted:
                found.converted.take(words, found.findings.at, found.place)
        if spells and (literals := self.spelled(row)):
            spelled = Finding("ML612", f"the text spells {', '.join(sorted(set(literals)))}", row.place)
            yield from self.once([spelled], row)
        texts = list(text_findings(row, layout))
        if not row.kind.counts_as_wanted(row):
            texts = [finding for finding in texts if finding.rule not in LEGITIMATE_IF_UNWANTED]
            of_prompt = text_findings(row.kind.wanted_part(row), layout)
            texts += [finding for finding in of_prompt if finding.rule in LEGITIMATE_IF_UNWANTED]
        # the first label tells where a completion begins, so that an empty one is no turn that is missing
        has_all = origin == "written" or not row.kind.is_chat
        yield from self.once((each for each in texts if has_all or each.rule not in LOST_IN_IDS), row)
        answers: JudgedAnswers | None = None
        if row.kind.is_chat and row.kind.counts_as_wanted(row):
            if self._answers is None:
                answers = NO_TOKENIZER
            elif expected is not None:
                answers = self._answers.judge(row, expected, {finding.rule for finding in texts})
        judged = JudgedRow(row, found.place, found.file, origin, answers, self.thinks)
        for name, observer in self._of_rows:
            yield from observer.observe_row(judged, found.states.of(name))

    def observe_record(self, record: JudgedRecord, found: RowPass) -> Iterator[Finding]:
        """Add a record to the table of a pass, show it to the rules, and yield its findings.

        Args:
            record: The record.
            found: The pass, which looks at the record.
        """
        _add(found.table, record, sketches=self._sketches)
        for name, observer in self._observers:
            yield from observer.observe(record, found.states.of(name))


def _add(table: JudgedTable, record: JudgedRecord, *, sketches: bool) -> None:
    """Add a record to a table.

    Args:
        table: The table.
        record: The record.
        sketches: Whether to make its sketch.
    """
    index = len(table)
    table.places.append(record.at)
    table.lines.append(record.place.line or 0)
    table.held_out.append(record.is_held_out)
    table.short.append(has_short_answer(record.rows[0]))
    digests = [_digests(side) for side in record.trained]
    if record.rows[0].kind.sides:
        # answers to one prompt are the point of such records: their prompts are not compared
        whole, opposite = record_digests(record.rows, [digest for _, digest in digests])
        table.sided.append(index)
        table.opposites += opposite
    else:
        [(prompts, whole)] = digests
        for prompt in prompts:
            table.prompts += prompt
            table.owners.append(index)
    table.rows += whole
    table.likenesses += row_likeness(record.whole)
    if sketches:
        table.sketches += row_sketch(record.whole)


def _digests(encoded: EncodedRow) -> tuple[list[bytes], bytes]:
    """Return a digest of the ids before each turn that is trained on, and one of the whole row with its labels."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    turns = (next(spans) for _, spans in itertools.groupby(encoded.spans, key=attrgetter("turn")))
    # in front of the first turn there is no prompt, such as before the text of a record without turns
    starts = [first.start for first in turns if first.supervised and first.turn != 0]
    # one growing digest: hashing each prompt from its beginning would be quadratic in the turns
    prompts = []
    end = 0
    for start in starts:
        digest.update(array("q", encoded.input_ids[end:start]).tobytes())
        prompts.append(digest.copy().digest())
        end = start
    digest.update(array("q", encoded.input_ids[end:]).tobytes())
    digest.update(array("q", encoded.labels or ()).tobytes())
    return prompts, digest.digest()
