"""The tables of the page on the guard: faults that the tests plant in runs, and healthy runs, from tests/support."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from guard_faults import BEFORE, Fault, faults
from guard_healthy import Healthy, healthy_runs
from guard_trl_runs import trl_faults, trl_healthy_runs


def tables_of_guarded_runs() -> Iterator[str]:
    """Yield the lines of a table of faults for each library, and of the lists of healthy runs."""
    found, found_in_trl = [*faults(), *faults(processes=2)], [*trl_faults()]
    yield f"The tests plant {len(found) + len(found_in_trl)} faults. With `Trainer`:"
    yield from _table(found)
    yield from ("", "With trainers of TRL:")
    yield from _table(found_in_trl)
    healthy, healthy_in_trl = [*healthy_runs()], [*trl_healthy_runs()]
    count = len(healthy) + len(healthy_in_trl)
    yield from ("", f"{count} healthy runs go on, each with the losses that it has without the guard:", "")
    yield f"- without a finding: {_listed(run for run in healthy if not run.note)}"
    yield f"- without a finding, of TRL: {_listed(healthy_in_trl)}"
    yield f"- with the note [ML327](rules.md#ml327): {_listed(run for run in healthy if run.note)}"


def _table(rows: Iterable[Fault]) -> Iterator[str]:
    yield from ("", "| fault | first finding |", "|---|---|")
    yield from (f"| {fault.cause.rstrip('.')} | {_finding(fault)} |" for fault in rows)


def _finding(fault: Fault) -> str:
    places = [f"`{fault.place}`", *([fault.token] if fault.token else [])]
    if fault.moment != BEFORE:
        places.append(fault.moment.partition(",")[0])
    return f"[{fault.rule}](rules.md#{fault.rule.lower()}) {', '.join(places)}"


def _listed(runs: Iterable[Healthy]) -> str:
    return "; ".join(run.words for run in runs)
