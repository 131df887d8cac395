"""Verdicts as a JUnit file, which every CI system shows as tests."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from xml.etree import ElementTree

from pytest_mistral_lora.report.judged import Judged, JudgedCase, file_place
from pytest_mistral_lora.report.secrets import public_text, redacted

# the characters that XML 1.0 has no way to write, not even as references
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


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
        _add_case(suite, case)
    ElementTree.indent(suites)
    text: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return f"{text.decode()}\n"


def _add_case(suite: ElementTree.Element, case: JudgedCase) -> None:
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
    text = public_text(case.text, case.findings)
    first = text.partition("\n")[0]
    if case.outcome == "failed":
        failure = {"type": next((value for name, value in properties if name == "rule"), ""), "message": _in_xml(first)}
        ElementTree.SubElement(test, "failure", failure).text = _in_xml(text)
    elif case.outcome == "skipped":
        ElementTree.SubElement(test, "skipped", {"message": _in_xml(first)}).text = _in_xml(text)
    elif text:
        ElementTree.SubElement(test, "system-out").text = _in_xml(text)


def finding_properties(findings: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield name and value of the properties of a test: each rule that it breaks, with the first file and line."""
    # a check of a long file has thousands of findings, and a reader of tests wants the rule and one place
    seen = set()
    for finding in findings:
        if finding["rule"] in seen:
            continue
        seen.add(finding["rule"])
        yield "rule", finding["rule"]
        yield from _file_and_line(finding)


def _file_and_line(finding: Mapping[str, Any]) -> list[tuple[str, str]]:
    place = file_place(finding["place"])
    if place is None:
        return []
    file = ("file", redacted(place.file.as_posix()))
    return [file, ("line", str(place.line))] if place.line else [file]


def _in_xml(text: str) -> str:
    return _NOT_IN_XML.sub(lambda found: ascii(found[0])[1:-1], redacted(text))
