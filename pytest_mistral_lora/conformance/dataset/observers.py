"""The rules on the rows of a record, which see every source: chat rows, encoded rows, rows read back from ids.

Each yields the findings of a row, or notes what only a whole file shows: `dataset.report` judges that at the end.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from array import array
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.chunks.registry import chunk_types, types_in
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.dataset.answers import (
    BY_GRAMMAR,
    CALL_IDS_REFUSED,
    LOST,
    NOT_BY_GRAMMAR,
    NOT_READ_BACK,
    DecodingJudge,
)
from pytest_mistral_lora.conformance.dataset.file_signs import note_file_signs
from pytest_mistral_lora.conformance.dataset.pairs import (
    LEGITIMATE_IF_UNWANTED,
    add_sides,
    pair_findings,
    record_digests,
)
from pytest_mistral_lora.conformance.dataset.repeats import row_likeness, row_sketch
from pytest_mistral_lora.conformance.dataset.row_findings import text_findings
from pytest_mistral_lora.conformance.dataset.tally import DIGEST_BYTES, DatasetTally, SignCount, unpacked_place
from pytest_mistral_lora.conformance.dataset.texts import main_script, sign_findings, spelled_tokens
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import OBSERVERS, JudgedRecord, Origin, named_observer

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

LOST_IN_IDS: Mapping[str, str] = {
    "ML614": "messages that the encoder joins into one turn are one message when the ids are read back",
    "ML616": "an empty answer cannot be told from a turn that is missing: ML560; an empty completion is ML616",
    "ML628": "a text that is marked up for another family is ML584 in ids",
    "ML648": "characters that are not encoded are not in the ids; U+2581 is a space, at the end of an answer ML528, "
    "ML529 or, if the answer is nothing else, ML560",
}
"""Rules that do not see conversations that are read back from ids, each with the reason."""


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
        self._further = [(name, named_observer(name)) for name in OBSERVERS]

    def begin_record(self) -> None:
        """Begin a record: a fault of the prompt of both its sides is reported once."""
        self._noted.clear()

    def note(self, tally: DatasetTally, finding: Finding, row: Row | None) -> None:
        """Add a finding of a row to a tally; of both sides of a pair, a fault of their prompt once."""
        if row is not None and row.kind.sides:
            part, side = finding.place.part, row.kind.side_part(row)
            noted = (finding.rule, finding.found, part[len(side) :] if part[: len(side)] == side else part)
            if noted in self._noted:
                return
            self._noted.add(noted)
        tally.findings.add(finding)

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
        tally: DatasetTally,
        *,
        origin: Origin = "written",
        spells: bool = True,
    ) -> None:
        """Add the findings and signs of one row to a tally.

        Args:
            row: The row.
            layout: Its encoding by mistral-common; without an oracle, by the backend.
            expected: mistral-common's encoding if its answers are to be decoded; else None.
            tally: The tally, which looks at the row's record.
            origin: Where its messages come from.
            spells: Whether its texts may spell control tokens: they are letters for this backend.
        """
        file = unpacked_place(tally.findings.at)[0]
        if spells and (literals := self.spelled(row)):
            found = f"the text spells {', '.join(sorted(set(literals)))}"
            self.note(tally, Finding("ML612", found, row.place), row)
        texts = list(text_findings(row, layout))
        if not row.kind.counts_as_wanted(row):
            texts = [finding for finding in texts if finding.rule not in LEGITIMATE_IF_UNWANTED]
            of_prompt = text_findings(row.kind.wanted_part(row), layout)
            texts += [finding for finding in of_prompt if finding.rule in LEGITIMATE_IF_UNWANTED]
        for finding in texts:
            # the first label tells where a completion begins, so that an empty one is no turn that is missing
            if origin == "written" or not row.kind.is_chat or finding.rule not in LOST_IN_IDS:
                self.note(tally, finding, row)
        if row.kind.is_chat and row.kind.counts_as_wanted(row):
            self._judge_answers(row, expected, {finding.rule for finding in texts}, tally, file, origin)
        self._note_signs(row, tally, file, origin)

    def _note_signs(self, row: Row, tally: DatasetTally, file: int, origin: Origin) -> None:
        """Add the signs of the texts of a row to a tally: an answer that is not wanted may show any of them."""
        if not row.kind.starts_record(row):
            return  # the prompt is judged with the chosen answer
        for name, sign in sign_findings(row.kind.wanted_part(row), thinks=self.thinks):
            if origin != "written" and name in LOST_IN_IDS:
                continue
            tally.counts[file, name] += 1
            if sign is not None:
                tally.findings.add(sign)

    def _judge_answers(
        self,
        row: Row,
        expected: EncodedRow | None,
        broken: Collection[str],
        tally: DatasetTally,
        file: int,
        origin: Origin,
    ) -> None:
        """Add the findings of the answers of a row to a tally.

        Args:
            row: The row.
            expected: mistral-common's encoding; None if the answers cannot be decoded.
            broken: Rules of texts that the row breaks.
            tally: The tally.
            file: Index of the file.
            origin: Where its messages come from.
        """
        if self._answers is None:
            for kind in (NOT_READ_BACK, NOT_BY_GRAMMAR):
                tally.named[kind, "there is no Mistral tokenizer to decode answers with"] += 1
            return
        if expected is None:
            return
        judged = self._answers.judge(row, expected, broken)
        for finding in judged.findings:
            tally.findings.add(finding)
        if judged.no_decoder:
            tally.named[NOT_READ_BACK, judged.no_decoder] += 1
        if judged.has_grammar:
            tally.named[NOT_BY_GRAMMAR if judged.no_grammar else BY_GRAMMAR, judged.no_grammar] += 1
        lost = judged.lost if origin == "written" else ""
        signs = {CALL_IDS_REFUSED: "calls" if judged.refuses_call_ids else "", LOST: lost}
        for sign, shown in signs.items():
            if shown:
                tally.signs.setdefault((file, sign), SignCount()).add(tally.findings.at, shown, tally.place)

    def observe_record(self, record: JudgedRecord, tally: DatasetTally) -> None:
        """Add a record to the table of a tally, and note what only a whole file shows.

        Args:
            record: The record.
            tally: The tally, which looks at the record.
        """
        _add(tally, record, sketches=self._sketches)
        note_file_signs(tally, unpacked_place(tally.findings.at)[0], record.rows[0], record.layouts[0])
        for finding in pair_findings(record.rows, record.layouts):
            tally.findings.add(finding)
        for name, observer in self._further:
            state = tally.states.by_name.get(name)
            if state is None:
                state = tally.states.by_name[name] = observer.start()
            for finding in observer.observe(record, state):
                tally.findings.add(finding)


def _add(tally: DatasetTally, record: JudgedRecord, *, sketches: bool) -> None:
    """Add a record to the columns of a tally, and to the counts of its file.

    Args:
        tally: The tally.
        record: The record.
        sketches: Whether to make its sketch.
    """
    index, first, encoded = len(tally), record.rows[0], record.trained
    file = unpacked_place(tally.findings.at)[0]
    tally.places.append(tally.findings.at)
    tally.lines.append(tally.place.line or 0)
    tally.held_out.append(record.is_held_out)
    for side in encoded:
        tally.tokens[len(side.input_ids)] += 1
        tally.supervised[side.supervised_tokens] += 1
    digests = [_digests(side) for side in encoded]
    if first.kind.sides:
        # answers to one prompt are the point of such records: their prompts are not compared
        whole, opposite = record_digests(record.rows, [digest for _, digest in digests])
        tally.sided.append(index)
        tally.opposites += opposite
        add_sides(tally, file, record.rows, encoded)
    else:
        [(prompts, whole)] = digests
        for prompt in prompts:
            tally.prompts += prompt
            tally.owners.append(index)
    tally.rows += whole
    parts = (first, *(row.kind.answer_part(row) for row in record.rows[1:]))
    row = replace(first, messages=tuple(message for part in parts for message in part.messages))
    tally.likenesses += row_likeness(row)
    if sketches:
        tally.sketches += row_sketch(row)
    roles = [message["role"] for message in row.messages]
    calls = [call["function"]["name"] for message in row.messages for call in message.get("tool_calls") or ()]
    tally.named.update([*(("roles", role) for role in roles), *(("tools", name) for name in calls)])
    tally.named["scripts", main_script(row)] += 1
    tokens = sum(len(side.input_ids) for side in encoded)
    figures = {
        "rows": 1,
        "tokens": tokens,
        "supervised_tokens": sum(side.supervised_tokens for side in encoded),
        "tokens_trained_on": 0 if record.is_held_out else tokens,
        "messages": len(roles) if row.kind.is_chat else 0,
        "assistant_turns": sum(len(part.assistant_groups()) for part in parts) if row.kind.is_chat else 0,
        "rows_with_system_prompt": int("system" in roles),
        "rows_with_tools": int(bool(row.tools) or any("tool_calls" in message for message in row.messages)),
    }
    types = types_in(message.get("content") for message in row.messages)
    counts = (row.kind.count, *(chunk_types()[name].count for name in types))
    figures |= {name: 1 for name in counts if name}
    tally.counts.update({(file, name): figure for name, figure in figures.items()})


def _digests(encoded: EncodedRow) -> tuple[list[bytes], bytes]:
    """Return a digest of the ids before each turn that is trained on, and one of the whole row with its labels."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    turns = (next(spans) for _, spans in itertools.groupby(encoded.spans, key=lambda span: span.turn))
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
