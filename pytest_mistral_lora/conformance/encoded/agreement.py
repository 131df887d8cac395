"""Labels that all follow one objective which nobody declares: one finding in place of those of each row.

Each line says by which objectives its labels are exact, and whether they differ from those of `answers`. If all lines
of a file agree on one, that is how the trainer was set up, and not a fault of each row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.conformance.encoded.line_judge import LineVerdict
from pytest_mistral_lora.conformance.finding import Finding, rest_of_findings
from pytest_mistral_lora.places import Place

FEWEST_AGREEING = 5
"""Fewest rows whose labels differ from those of `answers`, and follow one other objective."""
MOST_ROWS_HELD = 1000
"""Most lines whose findings wait for the end of the file in full."""
_KEPT = 20
"""Most findings of a rule that wait beyond these lines; more are counted."""
OF_LABELS = frozenset(("ML541", "ML543", "ML544", "ML545", "ML546", "ML547", "ML548", "ML549", "ML550", "ML551"))
"""Rules of a row's labels, which one other objective can explain."""


@dataclass
class Agreement:
    """The objective that the lines of a file agree on so far, and the findings that wait for it.

    The lines come in the order of the file, so that the verdict depends on no part and on no process.

    Attributes:
        objectives: The objectives that the labels of all lines are exact by; empty if lines differ.
        rows: Number of lines whose labels differ from those of `answers`.
        explained: The findings of the lines that were given out without them, by rule.
    """

    objectives: frozenset[Objective]
    rows: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    _held: list[LineVerdict] = field(default_factory=list)
    _kept: dict[str, list[Finding]] = field(default_factory=dict)

    def take(self, verdict: LineVerdict) -> Iterator[LineVerdict]:
        """Add a line, and yield the lines that need not wait for the end of the file."""
        labels = verdict.labels
        if labels is not None:
            self.objectives &= labels.fits
            if labels.is_other and self.objectives:
                self.rows += 1
        if not self.objectives:
            yield from self._held
            self._held.clear()
            yield verdict
        elif self._held or _waits(verdict):
            self._held.append(verdict)
            if len(self._held) > MOST_ROWS_HELD or self.explained:
                yield from self._explained_lines()
        else:
            yield verdict

    def end(self) -> Iterator[LineVerdict]:
        """Yield the lines that wait: if all agree, without the findings that the objective explains."""
        if self.found is not None:
            yield from self._explained_lines()
            return
        yield from self._held
        self._held.clear()

    @property
    def found(self) -> Objective | None:
        """The objective of the fewest words that enough lines agree on; None if there is none."""
        return self._in_order[0] if self.rows >= FEWEST_AGREEING and self.objectives else None

    @property
    def _in_order(self) -> list[Objective]:
        every = [*Objective.expressible(("[THINK]", "[TOOL_CALLS]"))]
        return sorted(self.objectives, key=every.index)

    def findings(self, place: Place) -> Iterator[Finding]:
        """Yield the finding of the file; or, if lines differ in the end, what those had that were given out before.

        Args:
            place: The place of the file.
        """
        objective = self.found
        if objective is None:
            for rule, kept in self._kept.items():
                yield from kept
                if self.explained[rule] > len(kept):
                    yield rest_of_findings(rule, self.explained[rule] - len(kept), place)
            return
        others = [str(other) for other in self._in_order[1:] if other.without == objective.without]
        same = f"; {' and '.join(others)} would give the same labels" if others else ""
        yield Finding(
            "ML508",
            f"all labels follow the objective {objective} ({objective.meaning}), which nobody declares: "
            f"{self.rows:,} rows differ from answers{same}",
            place,
            f"the objective answers; or, if you mean it, a declaration: --objective {objective} "
            f'(objective="{objective}" in Python)',
            name=f"objective-{str(objective).replace(',', '-')}",
            # the weights of ids alone are read from their labels, which contradict nothing
            severity="error" if self.explained else "note",
            covers=tuple(sorted(self.explained.items())),
        )

    def _explained_lines(self) -> Iterator[LineVerdict]:
        for verdict in self._held:
            yield self._without_findings(verdict)
        self._held.clear()

    def _without_findings(self, verdict: LineVerdict) -> LineVerdict:
        """Return a line without the findings that its objective explains, and note these."""
        if not _waits(verdict):
            return verdict
        explained = [finding for finding in verdict.findings if finding.rule in OF_LABELS]
        for finding in explained:
            self.explained[finding.rule] += 1
            kept = self._kept.setdefault(finding.rule, [])
            if len(kept) < _KEPT:
                kept.append(finding)
        rest = tuple(finding for finding in verdict.findings if finding.rule not in OF_LABELS)
        return replace(verdict, findings=rest)


def _waits(verdict: LineVerdict) -> bool:
    """Return whether a line has findings that the objective of the file may explain."""
    labels = verdict.labels
    is_other = labels is not None and labels.is_other
    return is_other and any(finding.rule in OF_LABELS for finding in verdict.findings)
