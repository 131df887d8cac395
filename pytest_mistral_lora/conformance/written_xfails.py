"""A first list of known deviations, which accepts everything that a run found."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_mistral_lora.conformance.check_options import CheckOptions
from pytest_mistral_lora.conformance.outcome import CheckOutcome

_LONGEST = 110
_HEADER = (
    "# Deviations that were found. Write behind each `#` why you accept it, or fix it and remove its line: a line",
    "# without a reason is refused, and one that matches no finding any more fails the run.",
)


def xfails_text(outcomes: Iterable[CheckOutcome], options: CheckOptions) -> str:
    """Return the list of known deviations that accepts a run, with empty reasons, as `read_xfails` reads it.

    A finding whose cause has a name is listed by this name. A rule that one check breaks is listed by the node id of
    this check, so that it still fails in others. A rule that several checks break is listed once.

    Args:
        outcomes: The outcome of each check.
        options: Those of the run, which say what fails.
    """
    headlines: dict[str, list[str]] = {}
    homes: dict[tuple[str, str], dict[str, list[str]]] = {}
    for outcome in outcomes:
        if options.fails_not_checked and outcome.not_checked:
            headlines.setdefault(outcome.nodeid, []).append(f"not checked: {outcome.not_checked}")
        for finding in outcome.failing(notes=options.fails_notes):
            # a named cause, else the remaining findings of a rule
            checks = homes.setdefault((finding.rule, finding.name), {})
            checks.setdefault(outcome.nodeid, []).append(f"{finding.place}: {finding.found}")
    lines = list(_HEADER)
    for (rule, cause), checks in homes.items():
        nodeid, found = next(iter(checks.items()))
        # the narrowest entry that needs only one reason
        name = cause or (rule if len(checks) > 1 else nodeid)
        count = sum(map(len, checks.values()))
        several = f" in {len(checks)} checks" if len(checks) > 1 else ""
        counted = f" ({count} findings{several})" if count > 1 else ""
        headlines.setdefault(name, []).append(f"{rule}{counted} {found[0]}")
    for name, found in headlines.items():
        # one line each: a finding's text may quote a row, which must not become an entry
        lines += ["", *(f"# {' '.join(finding_text.split())}"[:_LONGEST] for finding_text in found), f"{name}  # "]
    return "\n".join(lines) + "\n"
