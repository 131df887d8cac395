"""The file that reports a false alarm: a finding of a report, its row, its rule and the versions."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.errors import InputError, and_more, did_you_mean
from pytest_mistral_lora.records.files import beginning
from pytest_mistral_lora.records.goldens import library_versions

FORM = 1
"""Version of the file's form."""
ISSUE_FORM = "A wrong verdict"
"""The name of the form for an issue, to which the file is attached."""
_MOST_NAMED = 8


def is_false_alarm(file: Path) -> bool:
    """Return whether an existing file is one of these, so that it may be replaced."""
    return re.match(r'\{\s*"false_alarm": \d+,', beginning(file)) is not None


def found_in(report: Mapping[str, Any], words: Sequence[str], place: str) -> dict[str, Any]:
    """Return the finding that words name, with the name of its check as `check`.

    Args:
        report: A report, as `read_report` returns it.
        words: The finding as it is printed, or its beginning: the rule's id, and the place.
        place: The name of the report, for errors.

    Raises:
        InputError: If no finding has that rule and place, or several have.
    """
    rule, _, wanted = " ".join(" ".join(words).split()).partition(" ")
    rule = rule.rstrip(":").upper()
    # a cause is one of the findings, with more keys
    known = {tuple(finding[key] for key in ("rule", "place", "found")): finding for finding in _findings(report)}
    of_rule = [finding for finding in known.values() if finding["rule"] == rule]
    if not of_rule:
        rules = sorted({finding["rule"] for finding in known.values()})
        found = f"it has no finding of {rule!r}{did_you_mean(rule, rules)}"
        expected = f"one of {_listed(rules, ', ')}" if rules else "a report with findings"
        raise InputError(found, place=place, expected=expected)
    named = [finding for finding in of_rule if _is_named(finding, wanted)]
    # a row is named by the beginning of the place of its field
    matching = [finding for finding in named if finding["place"] == wanted.rstrip(":")] or named
    if len(matching) == 1:
        return matching[0]
    found = f"{len(matching)} findings of {rule}" if matching else f"no finding of {rule} at {wanted!r}"
    shown = _listed([_head(finding) for finding in matching or of_rule], "; ")
    raise InputError(found, place=place, expected=f"one of these behind {rule}: {shown}")


def _listed(texts: Sequence[str], between: str) -> str:
    return f"{between.join(texts[:_MOST_NAMED])}{and_more(_MOST_NAMED, len(texts))}"


def _head(finding: Mapping[str, Any]) -> str:
    """Return place and fault of a finding as the first line of its text has them."""
    return " ".join(f"{finding['place']}: {finding['found']}".removeprefix(": ").split())


def _is_named(finding: Mapping[str, Any], wanted: str) -> bool:
    """Return whether the words behind a rule's id are a finding's place, its row, or its first line's beginning."""
    place, head = finding["place"], _head(finding)
    if not wanted or place == wanted.rstrip(":") or place.startswith(f"{wanted.rstrip(':')},"):
        return True
    # a line number must be whole: 1 is not the beginning of 12
    return len(wanted) > len(place) and head.startswith(wanted)


def _findings(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each finding; that of a cause last, since it has the row and the tokens."""
    for check in report["checks"]:
        name = check["nodeid"].partition("::")[2]
        yield from ({**finding, "check": name} for finding in check["findings"] if not finding["more"])
    yield from (dict(cause) for cause in report["causes"] if not cause["more"])


def option_of(command: str, *names: str) -> str:
    """Return the value of an option in a command line; empty if it is not given, or the line cannot be split."""
    words = words_of(command)
    for number, word in enumerate(words):
        option, sign, value = word.partition("=")
        if option in names:
            return value if sign else next(iter(words[number + 1 :]), "")
    return ""


def words_of(command: str) -> list[str]:
    """Return the words of a command line; none if it cannot be split, as a call of Python."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def false_alarm_data(
    report: Mapping[str, Any],
    finding: Mapping[str, Any],
    *,
    rule: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    row: Mapping[str, Any],
    judged_again: Mapping[str, Any],
    scrubbed: bool,
) -> dict[str, Any]:
    """Return the content of the file.

    Args:
        report: The report.
        finding: The finding.
        rule: The rule, as plain data.
        tokenizer: The identity of the tokenizer, or why it is not known.
        row: The row, or why it is left out.
        judged_again: Whether the row alone has the finding.
        scrubbed: Whether texts and paths are left out.
    """
    keys = (
        "rule",
        "severity",
        "since",
        "error_from",
        "place",
        "check",
        "found",
        "expected",
        "shape",
        "detail",
        "source",
    )
    commands = {"command": report["command"], "rerun": finding.get("commands", {}).get("rerun", "")}
    return {
        "false_alarm": FORM,
        "finding": {key: finding.get(key, "") for key in keys},
        "rule": dict(rule),
        "versions": {
            "of_the_run": {
                "pytest-mistral-lora": report["pytest_mistral_lora"],
                **report["libraries"],
                "Python": report["python"],
            },
            "here": {
                "pytest-mistral-lora": __version__,
                **library_versions(),
                "Python": platform.python_version(),
                "system": f"{platform.system()} {platform.machine()}",
            },
        },
        **{name: without_folders(text) if scrubbed else text for name, text in commands.items()},
        "tokenizer": dict(tokenizer),
        "scrubbed": scrubbed,
        "row": row.get("row"),
        **({"row_left_out": row["left_out"]} if row.get("left_out") else {}),
        "judged_again": dict(judged_again),
    }


def without_folders(command: str) -> str:
    """Return a command line whose paths are names alone; only its first word if it cannot be split."""
    words = words_of(command) or [re.split(r"\W", command)[0]]
    return shlex.join(map(_without_folder, words))


def _without_folder(word: str) -> str:
    option, sign, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{option}{sign}{last_name(value)}"


def last_name(path: str) -> str:
    """Return the last part of a path of any system; the text itself if it has one part."""
    return PurePath(PureWindowsPath(path).name if "\\" in path else path).name or path
