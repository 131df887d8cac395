"""Verdicts for other programs: judged cases and their places in files, as JUnit and SARIF 2.1.0.

A file of a verdict is named by its format: `.sarif`, or `.xml` for JUnit.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote
from xml.etree import ElementTree

from pytest_mistral_lora import __version__
from pytest_mistral_lora.escaping import printable, safe_json, safe_xml
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import beginning, put_text, require_writable
from pytest_mistral_lora.records.secrets import redacted
from pytest_mistral_lora.report.outcomes import Found, JudgedOutcome
from pytest_mistral_lora.report.secrets import public_text

CaseState = Literal["passed", "failed", "skipped"]

_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
# the two characters that XML 1.0 cannot write, not even as references; terminals do not obey them
_NOT_IN_XML = re.compile("[\ufffe\uffff]")


@dataclass(frozen=True, slots=True)
class JudgedCase:
    """One judged thing: a check, a recorded value, a transcript.

    Attributes:
        group: The parts of its name before the last one, joined by dots.
        name: The last part.
        outcome: `passed`, `failed`, or `skipped` if it was not checked.
        text: The findings for people, or the reason why it was not checked.
        findings: Its findings.
        seconds: Its duration.
    """

    group: str
    name: str
    outcome: CaseState
    text: str = ""
    findings: Sequence[Found] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdict of one command.

    Attributes:
        command: Its name, such as `mistral-lora check`.
        causes: The findings by cause as plain data, each with the keys of a finding, `check`, `count` and `text`.
        cases: Everything that was judged.
        verdict: The last line for people.
        subject: The file or folder that was judged; empty if there is not one.
        known: A line for each known fault of the installed libraries that can be a cause.
    """

    command: str
    causes: Sequence[Mapping[str, Any]]
    cases: Sequence[JudgedCase]
    verdict: str
    subject: str = ""
    known: Sequence[str] = ()


_MOST_LINES = 10**9


@dataclass(frozen=True, slots=True)
class FilePlace:
    """A place in a file that exists.

    Attributes:
        file: The file; relative to the workflow's workspace, or else to the current folder, if it is inside.
        line: The line, from 1; 0 if the finding is about the whole file.
    """

    file: Path
    line: int = 0

    @property
    def uri(self) -> str:
        """The file as a relative or absolute URI."""
        return self.file.as_uri() if self.file.is_absolute() else quote(os.fsencode(self.file.as_posix()))


def file_place(place: Place) -> FilePlace | None:
    """Return the file and the line of a finding's place; None if it is not in an existing file."""
    if place.source.is_value or not place.source.name or not os.path.lexists(place.source.name):
        return None
    # a larger number is no line: a log with such a line would be refused as a whole
    line = place.line or place.record or 0
    return FilePlace(_in_workspace(place.source.name), line if line < _MOST_LINES else 0)


def _place_of(finding: Mapping[str, Any]) -> FilePlace | None:
    return file_place(Place.from_json(finding["structured"]["place"]))


def _in_workspace(file: str) -> Path:
    # not resolved: a link must keep its own name
    path = Path(os.path.normpath(Path(file).absolute()))
    workspace = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd()).absolute()
    for folder in (workspace.resolve(), workspace):
        if path.is_relative_to(folder):
            return path.relative_to(folder)
    return path


def cases_of(outcomes: Iterable[JudgedOutcome], texts: Iterable[str]) -> Iterator[JudgedCase]:
    """Yield the judged case of each check.

    Args:
        outcomes: The outcome of each check.
        texts: The text of each check's findings.
    """
    # a known deviation passes
    states: Mapping[str, CaseState] = {"failed": "failed", "skipped": "skipped"}
    for outcome, text in zip(outcomes, texts, strict=True):
        group, _, name = outcome.nodeid.rpartition("::")
        state = states.get(outcome.state, "passed")
        shown = outcome.not_checked if state == "skipped" else text
        yield JudgedCase(group.replace("::", "."), name, state, shown, outcome.findings, outcome.seconds)


def message_of(cause: Mapping[str, Any]) -> str:
    """Return a cause in a few lines, without its tokens and its row."""
    count = f" ({cause['count']} findings)" if cause["count"] > 1 else ""
    place = f"{cause['place']}: " if cause["place"] else ""
    lines = [f"{place}{cause['found']}{count}", f"check: {cause['check']}"]
    lines += [f"expected: {cause['expected']}"] if cause["expected"] else []
    return printable(redacted("\n".join([*lines, f"fix: {_fix_of(cause)}"])))


def _fix_of(cause: Mapping[str, Any]) -> str:
    """Return the fix of a cause, and a line for each program that may have made the artifact."""
    return "\n".join([cause["fix"], *(f"{name}: {fix}" for name, fix in cause.get("fixes", {}).items())])


def junit_text(judged: Judged) -> str:
    """Return a JUnit file with a test for each judged case: rule, file and line are its properties."""
    counts = Counter(case.outcome for case in judged.cases)
    numbers = {
        "name": judged.command,
        "tests": str(counts.total()),
        "failures": str(counts["failed"]),
        "errors": "0",
        "skipped": str(counts["skipped"]),
        "time": f"{sum(case.seconds for case in judged.cases):.3f}",
    }
    suites = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(suites, "testsuite", {key: _in_xml(text) for key, text in numbers.items()})
    for case in judged.cases:
        properties = list(finding_properties(case.findings))
        # GitLab reads the file from an attribute
        places = (_file_and_line(finding) for finding in case.findings)
        place = dict(next(filter(None, places), ()))
        named = {"classname": case.group, "name": case.name, **place, "time": f"{case.seconds:.3f}"}
        test = ElementTree.SubElement(suite, "testcase", {key: _in_xml(text) for key, text in named.items()})
        if properties:
            group = ElementTree.SubElement(test, "properties")
            for name, value in properties:
                ElementTree.SubElement(group, "property", {"name": name, "value": _in_xml(value)})
        shown = public_text(case.text, [finding.to_json() for finding in case.findings])
        first = shown.partition("\n")[0]
        if case.outcome == "failed":
            rule = next((value for name, value in properties if name == "rule"), "")
            failure = {"type": rule, "message": _in_xml(first)}
            ElementTree.SubElement(test, "failure", failure).text = _in_xml(shown)
        elif case.outcome == "skipped":
            ElementTree.SubElement(test, "skipped", {"message": _in_xml(first)}).text = _in_xml(shown)
        elif shown:
            ElementTree.SubElement(test, "system-out").text = _in_xml(shown)
    ElementTree.indent(suites)
    text: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return safe_xml(f"{text.decode()}\n")


def finding_properties(findings: Iterable[Found]) -> Iterator[tuple[str, str]]:
    """Yield name and value of the properties of a test: each rule that it breaks, with the first file and line."""
    # a check of a long file has thousands of findings; a test report needs the rule and one place
    seen = set()
    for finding in findings:
        if finding.rule in seen:
            continue
        seen.add(finding.rule)
        yield "rule", finding.rule
        yield from _file_and_line(finding)


def _file_and_line(finding: Found) -> list[tuple[str, str]]:
    place = file_place(finding.place)
    if place is None:
        return []
    file = ("file", redacted(place.file.as_posix()))
    return [file, ("line", str(place.line))] if place.line else [file]


def _in_xml(text: str) -> str:
    return _NOT_IN_XML.sub(lambda found: ascii(found[0])[1:-1], printable(redacted(text)))


def sarif_data(judged: Judged) -> dict[str, Any]:
    """Return a log for code scanning, SARIF 2.1.0, with a result for each cause, as plain JSON data."""
    from pytest_mistral_lora.report.pages import rule_url

    # the severities of rules, error and note, are levels of SARIF
    rules = {
        cause["rule"]: {
            "id": cause["rule"],
            "shortDescription": {"text": cause["title"]},
            "fullDescription": {"text": cause["why"]},
            "help": {"text": _fix_of(cause)},
            **({"helpUri": url} if (url := rule_url(cause["rule"])) else {}),
            "defaultConfiguration": {"level": cause["severity"]},
        }
        for cause in reversed(judged.causes)
    }
    # GitHub refuses a whole log if one result has no file; the judged artifact is the nearest file
    subject = file_place(Place.of(judged.subject)) or FilePlace(_in_workspace("."))
    results = []
    for cause in judged.causes:
        place = _place_of(cause) or subject
        location: dict[str, Any] = {"artifactLocation": {"uri": redacted(place.uri)}}
        if place.line:
            location["region"] = {"startLine": place.line}
        results.append(
            {
                "ruleId": cause["rule"],
                "level": cause["severity"],
                "message": {"text": message_of(cause)},
                "locations": [{"physicalLocation": location}],
                "partialFingerprints": {"cause/v1": _fingerprint(cause)},
            }
        )
    driver = {"name": "pytest-mistral-lora", "version": __version__, "rules": list(rules.values())}
    return {"$schema": _SARIF, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _fingerprint(cause: Mapping[str, Any]) -> str:
    """Return a hash that is the same for a cause in each run, even if its first row has moved."""
    return hashlib.sha256(redacted(cause["cause"]).encode()).hexdigest()


def sarif_text(judged: Judged) -> str:
    """Return the text of `sarif_data`."""
    return f"{safe_json(sarif_data(judged), indent=2)}\n"


@dataclass(frozen=True, slots=True)
class VerdictFormat:
    """A format of files for other programs.

    Attributes:
        text: Writes a verdict.
        beginning: A pattern of the first characters of a file that we wrote.
    """

    text: Callable[[Judged], str]
    beginning: str


VERDICT_FORMATS: Mapping[str, VerdictFormat] = {
    ".sarif": VerdictFormat(sarif_text, r'\{\s*"\$schema": [^{]*"runs": .*"name": "pytest-mistral-lora"'),
    ".xml": VerdictFormat(junit_text, r'<\?xml [^>]*>\s*<testsuites>\s*<testsuite name="mistral-lora '),
}
"""The formats of files for other programs, by the end of the file's name."""


def verdict_format(path: Path) -> VerdictFormat | None:
    """Return the format that the name of a file asks for; None if it is not one for another program."""
    return next((found for end, found in VERDICT_FORMATS.items() if path.name.endswith(end)), None)


def require_verdict_file(path: Path, made_as: VerdictFormat) -> Path:
    """Return the path of a verdict, if it can be written and overwrites nothing else.

    Raises:
        InputError: As for `require_writable`; of existing files, only an earlier verdict may be replaced.
    """
    return require_writable(path, lambda file: re.match(made_as.beginning, beginning(file), re.DOTALL) is not None)


def write_verdict(path: Path, made_as: VerdictFormat, judged: Judged) -> None:
    """Write a verdict atomically.

    Raises:
        InputError: If the file cannot be written, or it exists and is not an earlier verdict.
    """
    require_verdict_file(path, made_as)
    put_text(path, made_as.text(judged))
