"""The rules as an earlier version of this package had them: what is newer is a note, and fails no run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pytest_mistral_lora.conformance.finding import RULES, Finding, version_key
from pytest_mistral_lora.errors import InputError


def known_versions() -> list[str]:
    """Return the versions that have added a rule or made a note an error, the oldest first."""
    versions = {version for rule in RULES.values() for version in (rule.since, rule.error_since) if version}
    return sorted(versions, key=version_key)


def newest_rules() -> str:
    """Return the last version that has changed the rules."""
    return known_versions()[-1]


@dataclass(frozen=True, slots=True)
class RuleSet:
    """The rules of a version.

    Attributes:
        version: The version, such as `0.1`.
    """

    version: str

    @classmethod
    def of(cls, version: str, place: str) -> RuleSet:
        """Return the rules of a version.

        Args:
            version: The version, as a user writes it.
            place: The option or key that names it.

        Raises:
            InputError: If no rule has this version.
        """
        versions = known_versions()
        if version not in versions:
            raise InputError(
                f"{version!r} is not a version of the rules that this installation knows",
                place=place,
                expected=", ".join(versions) if isinstance(version, str) else f'a text, such as "{versions[-1]}"',
                next_step="Name one of these, or install the version that you want.",
            )
        return cls(version)

    @classmethod
    def given(cls, rules: str | None) -> RuleSet | None:
        """Return the rules that an argument `rules=` names; None for all rules.

        Raises:
            InputError: If no rule has this version.
        """
        return None if rules is None else cls.of(rules, "rules=")

    def applied(self, findings: Iterable[Finding]) -> Iterator[Finding]:
        """Yield findings by these rules: what is an error by newer ones alone is a note that names their version."""
        return map(self._applied, findings)

    def _applied(self, finding: Finding) -> Finding:
        if any(self._has_error(rule) for rule, _ in finding.covers):
            return finding  # it stands for findings that these rules make
        rule = RULES[finding.rule]
        is_newer = self._is_older_than(rule.since)
        if finding.severity == "note":
            return replace(finding, is_newer=True) if is_newer else finding
        error_from = rule.error_since or rule.since
        if not self._is_older_than(error_from):
            return finding
        return replace(finding, severity="note", error_from=error_from, is_newer=is_newer)

    def _has_error(self, rule: str) -> bool:
        known = RULES[rule]
        return known.severity == "error" and not self._is_older_than(known.error_since or known.since)

    def _is_older_than(self, version: str) -> bool:
        return version_key(self.version) < version_key(version)
