"""After an upgrade of this package: how its rules differ from those of the last green run of the same targets."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.conformance.finding import FORMER_RULES, RULES, Finding, version_key
from pytest_mistral_lora.errors import MistralLoraError

_RELEASE = re.compile(r"(\d+\.\d+)(?:\.\d+)?(?:\.?(?:a|b|rc|dev|post)\d+)?")
_SHOWN = 5


def green_version(report: Path, targets: Collection[str]) -> str:
    """Return the version of this package with which a run of some targets was last green, as an earlier report has it.

    Args:
        report: The file of the earlier report, which may be missing, or a page.
        targets: The names of the targets of this run; the earlier run must have judged them all.
    """
    if report.suffix != ".json" or not report.is_file():
        return ""
    with suppress(MistralLoraError, OSError, LookupError, TypeError, ValueError):
        data = read_json(report)
        judged = {check["target"] for check in data["checks"]}
        if targets and judged.issuperset(targets):
            return release(data["pytest_mistral_lora"] if data["exit_status"] == 0 else data.get("last_green", ""))
    return ""


def release(version: object) -> str:
    """Return a version of this package; empty for any other value of a file."""
    return version if isinstance(version, str) and _RELEASE.fullmatch(version) else ""


def changes_since(version: str, findings: Iterable[Finding]) -> str:
    """Return the changes of the rules since a version, in words; empty if there is none.

    Args:
        version: The version of the last green run.
        findings: The findings of this run, among which those of tightened bounds are.
    """
    found = _RELEASE.fullmatch(version)
    if found is None:
        return ""
    then = version_key(found[1])
    new = [rule.id for rule in RULES.values() if version_key(rule.since) > then]
    errors = [rule.id for rule in RULES.values() if rule.error_since and version_key(rule.error_since) > then]
    renamed = [
        f"{name} is {' and '.join(former.rules)}"
        for name, former in FORMER_RULES.items()
        if version_key(former.since) > then
    ]
    tighter = sorted({finding.rule for finding in findings if version_key(finding.since) > then} - {*new})
    parts = (
        ("renamed", renamed),
        ("notes that are errors now", [name for name in errors if name not in new]),
        ("rules that find more", tighter),
        ("new rules", new),
    )
    return "; ".join(f"{title}: {_listed(names)}" for title, names in parts if names)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
