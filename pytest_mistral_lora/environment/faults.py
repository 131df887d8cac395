"""The user's installation: versions and their support, extras, known faults of a combination."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pytest_mistral_lora.extras import EXTRAS, PACKAGE
from pytest_mistral_lora.programs.facts import Fact, Standing, Symptom, facts

OK, MISSING, UNSUPPORTED = "ok", "missing", "unsupported"


@dataclass(frozen=True, slots=True)
class LibraryState:
    """A library that this package uses.

    Attributes:
        name: Its name in pip.
        version: The installed version; empty if it is not installed.
        supported: The versions that this package supports, such as `>=1.13`.
        extra: The extra that installs it; empty for every install.
    """

    name: str
    version: str
    supported: str
    extra: str = ""

    @property
    def state(self) -> str:
        """`ok`, `missing` or `unsupported`."""
        if not self.version:
            return MISSING
        # judge a nightly or a release candidate by its number
        return OK if SpecifierSet(self.supported).contains(self.version, prereleases=True) else UNSUPPORTED

    @property
    def command(self) -> str:
        """The command that installs a supported version."""
        return f"pip install '{self.name}{self.supported}'"


@dataclass(frozen=True, slots=True)
class InstallationFault:
    """What is wrong with an installation, or may be: a known fault, or a library that does not fit.

    Attributes:
        id: A stable name.
        found: The fault.
        change: The remedy.
        severity: `error`: it changes ids or stops a run; `note`: it only matters in the case that `found` names, or
            nobody has checked the installed versions.
        versions: The versions that have a known fault together, by library; empty for everything else.
        remark: The versions that it was seen with, if the installed ones are newer; else empty.
        source: The report of a known fault, or the page that shows it.
        rules: Ids of the rules that the user's files break for this reason.
        server: The title of the server that has the fault; empty for libraries.
    """

    id: str
    found: str
    change: str
    severity: str = "error"
    versions: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""
    source: str = ""
    rules: tuple[str, ...] = ()
    server: str = ""

    @classmethod
    def of(cls, fact: Fact, standing: Standing) -> InstallationFault:
        """Return a known fault of an installation.

        Args:
            fact: The fault.
            standing: What it says about the installed versions.
        """
        return cls(
            fact.id,
            fact.symptom,
            fact.way_out,
            fact.severity if standing.state == "present" else "note",
            fact.ranges,
            standing.remark,
            fact.source,
            fact.rules,
            # a server that is not known to be installed here
            fact.program.title if fact.program.kind == "server" and standing.state != "present" else "",
        )


@cache
def installed_versions() -> dict[str, str]:
    """Return the version of each installed distribution by its name: lower case, words joined by hyphens.

    Of two distributions with one name, it is the first on the path, which is the one that Python imports.
    """
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            versions.setdefault(re.sub(r"[-_.]+", "-", name.lower()), distribution.version)
    return versions


def library_states(installed: Mapping[str, str]) -> Iterator[LibraryState]:
    """Yield the libraries of this package's own metadata: first those of every install, then those of extras.

    Args:
        installed: The installed versions by name.
    """
    requirements = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    for extra in ("", *(extra.name for extra in EXTRAS)):
        for requirement in requirements:
            # an extra that includes another extra names this package itself
            if requirement.name == PACKAGE or bool(extra) is not ("extra" in str(requirement.marker)):
                continue
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield LibraryState(
                    requirement.name, installed.get(requirement.name.lower(), ""), str(requirement.specifier), extra
                )


def present_faults(
    installed: Mapping[str, str], libraries: Iterable[LibraryState], torch_error: str = ""
) -> list[InstallationFault]:
    """Return the faults of an installation, errors first; then those of servers that a check can show.

    A server runs in an environment of its own, which is not known here: its faults are notes.

    Args:
        installed: The installed versions by name.
        libraries: The result of `library_states`.
        torch_error: Why torch cannot be imported; empty if it can, or is not installed.
    """
    known = []
    for fact in facts():
        standing = fact.standing(installed)
        may_run_elsewhere = fact.program.kind == "server" and fact.can_explain and standing.state == "absent"
        if standing.state in ("present", "unchecked") or may_run_elsewhere:
            known.append(InstallationFault.of(fact, standing))
    explained = {name for fault in known if fault.severity == "error" for name in fault.versions}
    found = []
    for library in libraries:
        if library.name in explained:
            continue
        # a library of an extra can only be wrong if it is installed
        if library.state == UNSUPPORTED or (library.state == MISSING and not library.extra):
            text = (
                f"{library.name} {library.version} is installed"
                if library.version
                else f"{library.name} is not installed"
            )
            expected = f"{text}; expected {library.supported}"
            found.append(InstallationFault(f"unsupported-{library.name}", expected, library.command))
    if torch_error:
        change = (
            "install a torch that fits this machine and its other libraries: https://pytorch.org/get-started/locally"
        )
        found.append(InstallationFault("torch-cannot-be-imported", torch_error, change))
    return sorted([*found, *known], key=lambda fault: fault.severity == "note")


def known_cause_lines(symptoms: Iterable[Symptom], installed: Mapping[str, str] | None = None) -> list[str]:
    """Return a line for each known fault of the installed versions, or of the judged servers, that can cause a finding.

    Args:
        symptoms: The findings.
        installed: The installed versions by name; they are only looked up if there is a finding.
    """
    found = list(symptoms)
    lines = []
    for fact in facts() if found else ():
        explained = [symptom for symptom in found if fact.explains(symptom)]
        if not explained:
            continue
        installed = installed or installed_versions()
        by_remark: dict[str, list[str]] = {}
        for symptom in explained:
            standing = fact.standing_for(symptom, installed)
            if standing.state in ("present", "unchecked"):
                by_remark.setdefault(standing.remark, []).append(symptom.rule)
        for remark, rules in by_remark.items():
            is_here = fact.program.kind != "server"
            versions = ", ".join(
                f"{name} {installed[name] if is_here else range_}" for name, range_ in fact.ranges.items()
            )
            note = f"; {remark}" if remark else ""
            broken = ", ".join(dict.fromkeys(rules))
            lines.append(f"known of {versions} ({broken}): {fact.symptom}{note}. Change: {fact.way_out}")
    return lines
