"""The rules on whole files: what only the texts, answers and repeats of all rows of a file show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pytest_mistral_lora.chat.kinds.preference import CHOSEN, REJECTED
from pytest_mistral_lora.conformance.dataset.answers import CALL_IDS_REFUSED, LOST, call_ids_finding, lost_finding
from pytest_mistral_lora.conformance.dataset.file_faults import faulty_rows
from pytest_mistral_lora.conformance.dataset.pairs import CHOSEN_LONGER, REJECTED_LONGER, length_finding
from pytest_mistral_lora.conformance.dataset.repeats import Repeats
from pytest_mistral_lora.conformance.dataset.tally import DatasetTally, SignCount, packed_place, unpacked_place
from pytest_mistral_lora.conformance.dataset.texts import COMPLETE_TURNS, SIGNS
from pytest_mistral_lora.conformance.row_pass import named_observer
from pytest_mistral_lora.places import Place


@dataclass(frozen=True)
class FileFigures:
    """What the rules on whole files count; empty for a sample.

    Attributes:
        repeats: The numbers of repeated rows, as `Repeats.counts` returns them.
        no_near_rows: Why held-out rows were not compared with nearly equal rows; empty if they were.
        texts: The rows that have each fault of a file, and the first of them, by its name.
    """

    repeats: dict[str, Any] = field(default_factory=dict)
    no_near_rows: str = ""
    texts: dict[str, Any] = field(default_factory=dict)


def note_files(tally: DatasetTally, files: Sequence[Place], *, is_sample: bool = False) -> FileFigures:
    """Add the findings that all rows of a file show to a tally, which is in order.

    Args:
        tally: The result of a pass.
        files: The place of each file that it read.
        is_sample: Whether more rows follow, as behind the batches of a guard: then no rule judges the whole.
    """
    found = _FileRules(tally, files)
    found.note_decoding()
    if is_sample or not COMPLETE_TURNS.is_systematic(tally.counts, len(files)):
        tally.findings.weaken("ML628")
    for sign in SIGNS:
        if sign.rule in tally.findings and (is_sample or not sign.is_systematic(tally.counts, len(files))):
            tally.findings.rename(sign.rule, sign.note)
    found.note_observers(is_sample=is_sample)
    if is_sample:
        return FileFigures()
    texts = found.note_file_faults()
    repeats = Repeats(tally, found.place)
    # rows before prompts: the prompt of a row that is trained on is not reported again
    repeats.note_equal_rows()
    repeats.note_near_rows()
    repeats.note_repeated_prompts()
    repeats.note_opposites()
    found.note_lengths()
    return FileFigures(repeats.counts(), repeats.no_near_rows, texts)


@dataclass(frozen=True)
class _FileRules:
    tally: DatasetTally
    files: Sequence[Place]

    def place(self, row: int) -> Place:
        """Return the place of a row of the table by its index."""
        file, record = unpacked_place(self.tally.places[row])
        return replace(self.files[file], record=record, line=self.tally.lines[row] or None)

    def note_file_faults(self) -> dict[str, Any]:
        """Note the faults of whole files, and return the rows that have each, and the first of them, by its name."""
        figures: dict[str, dict[str, Any]] = {}
        for faulty in faulty_rows(self.tally, len(self.files), self.place):
            examples = faulty.count.examples
            if faulty.severity:
                self.tally.findings.at = examples[0].at
                self.tally.findings.add(faulty.finding())
            known = figures.setdefault(faulty.fault.name, {"rows": 0, "examples": []})
            known["rows"] += faulty.count.rows
            known["examples"] += [str(example.place) for example in examples][: SignCount.MOST - len(known["examples"])]
        return figures

    def note_decoding(self) -> None:
        """Note once what many rows can have in common: characters that are not encoded, and ids that are refused."""
        found: dict[str, SignCount] = {CALL_IDS_REFUSED: SignCount(), LOST: SignCount()}
        for (_, sign), evidence in self.tally.signs.items():
            if sign in found:
                found[sign].extend(evidence)
        refused, lost = found[CALL_IDS_REFUSED], found[LOST]
        if refused.rows:
            self.tally.findings.at = refused.examples[0].at
            self.tally.findings.add(call_ids_finding(refused.rows, refused.examples[0].place))
        if lost.rows:
            self.tally.findings.at = lost.examples[0].at
            self.tally.findings.add(lost_finding(lost))

    def note_observers(self, *, is_sample: bool) -> None:
        """Note the findings of observers; of a sample, those of the observers that may judge one."""
        indices = {file.whole: index for index, file in reversed([*enumerate(self.files)])}
        for name, state in self.tally.states.by_name.items():
            observer = named_observer(name)
            if is_sample and not observer.fires_on_sample:
                continue
            for finding in observer.report(state, self.files):
                place = finding.place
                self.tally.findings.at = packed_place(indices.get(place.whole, 0), place.record or 0)
                self.tally.findings.add(finding)

    def note_lengths(self) -> None:
        """Note once for each file of pairs that the lengths of their answers tell the sides apart."""
        for index, file in enumerate(self.files):
            lengths = {side: tokens for (at, side), tokens in self.tally.answer_tokens.items() if at == index}
            counts = self.tally.counts
            longer = {CHOSEN: counts[index, CHOSEN_LONGER], REJECTED: counts[index, REJECTED_LONGER]}
            finding = length_finding(lengths, longer, file)
            if finding is not None:
                self.tally.findings.at = packed_place(index, 0)
                self.tally.findings.add(finding)
