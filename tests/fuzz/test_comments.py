"""Hostile texts in GitHub's comments and summaries, by chance: they are code, where GitHub finds nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from fuzzing import MakeCampaign
from github_markdown import rendered

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.groups import FILE_WIDTH, FindingGroups
from pytest_mistral_lora.escaping import code_block, code_span, printable
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.report.compare_reports import ReportComparison
from pytest_mistral_lora.report.github import add_job_summary
from pytest_mistral_lora.report.judged import Judged, JudgedCase

PIECES = (
    *(
        "@bob",
        "\\@bob",
        "@octo/team",
        "&#64;bob",
        "a@b.co",
        "www.evil.test",
        "https://evil.test/",
        "ftp://x",
        "mailto:a@b.co",
    ),
    *(
        "#1",
        "\\#1",
        "GH-1",
        "us/ours#1",
        "us/ours@deadbeef1",
        "0123456789abcdef0123456789abcdef01234567",
        ":tada:",
        "[^1]",
    ),
    *("<b>", "<img src=//evil.test>", "</code>", "</td>", "<!--", "-->", "<a href=x>", "&lt;", "<x@y.z>", "<details>"),
    *(
        "[a](//evil.test)",
        "![a](//evil.test)",
        "[a]: //evil.test",
        "**",
        "__",
        "~~",
        "# ",
        "> ",
        "- ",
        "1. ",
        "---",
        "$",
        "$$",
    ),
    *(
        "`",
        "``",
        "```",
        "`" * 40,
        "`" * 41,
        "`" * 80,
        "`" * 81,
        "`" * 255,
        "`" * 300,
        "~~~",
        "|",
        "\\|",
        "\\\\|",
        "||",
        "\\",
    ),
    *(
        "\n",
        "\r",
        "\t",
        "\n\n",
        "    ",
        " ",
        "a",
        "x",
        "é",
        "漢",
        "👩",
        "\u2028",
        "\u202e",
        "\x00",
        "\x1b[31m",
        "\ud800",
        "\u00a0",
    ),
)


def text_of(chance: random.Random) -> str:
    return "".join(chance.choice(PIECES) for _ in range(chance.randrange(1, 14)))


def shown_in(code: str) -> str:
    """The text of code without the break that stands before a pipe."""
    return code.replace("\u2060", "")


@pytest.mark.parametrize("in_table", [False, True])
def test_a_code_span_shows_its_text_and_nothing_else(in_table: bool, campaign: MakeCampaign) -> None:
    counts = campaign("comments spans" + " in a table" * in_table, 800)
    for number in counts.seeds():
        text = text_of(random.Random(number))
        span = code_span(text, in_table=in_table)
        found = rendered(f"| a | b |\n|---|---|\n| x{span} | {span} |\n" if in_table else f"x {span} y\n")
        expected = printable(" ".join(text.split()))
        if "`" * 41 not in expected:
            assert [*map(shown_in, found.code)] == [expected] * (2 if in_table else 1) * bool(expected), ascii(text)
        assert found.faults() == [], ascii(text)
        block = rendered(f"{code_block(text)}\n")
        assert (block.outside.strip(), block.faults()) == ("", []), ascii(text)
        if "`" * 41 not in text:
            assert block.code == [f"{printable(text)}\n"], ascii(text)
        counts.count("cases")


def comparison_of(chance: random.Random) -> ReportComparison:
    def cause() -> dict[str, Any]:
        names = {key: text_of(chance) for key in ("cause", "check", "place", "found", "fix")}
        fixed = {"rule": "ML601", "name": "", "severity": "error", "count": chance.randrange(1, 4), "title": ""}
        place = (Place.of(text_of(chance), record=1) / text_of(chance)).to_json()
        # a report of an earlier version has none
        structured = (
            {"structured": {"found": names["found"], "place": place, "others": []}} if chance.random() < 0.8 else {}
        )
        return {**fixed, **names, **structured}

    def report() -> dict[str, Any]:
        checks = [
            {
                "nodeid": "::x",
                "outcome": chance.choice(("passed", "skipped")),
                "not_checked": text_of(chance),
                "known": [],
            },
            {"nodeid": text_of(chance), "outcome": "passed", "not_checked": "", "known": []},
        ]
        libraries = {text_of(chance): text_of(chance)}
        return {"causes": [cause() for _ in range(3)], "checks": checks, "libraries": libraries, "python": "3.11.2"}

    before, after = report(), report()
    after["checks"][1] = {**before["checks"][1], "outcome": "skipped", "not_checked": text_of(chance)}
    return ReportComparison(before, after)


def test_nothing_in_a_comment_or_a_summary_is_obeyed(
    campaign: MakeCampaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    counts = campaign("comments whole", 200)
    for number in counts.seeds():
        chance = random.Random(number)
        comparison = comparison_of(chance)
        comment = rendered(comparison.markdown())
        assert comment.faults() == [], number
        rows = sum(found.state != "unchanged" for found in comparison.causes)
        assert comment.tags.count("td") == 3 * rows, number
        groups, texts = FindingGroups(), [text_of(chance) for _ in range(6)]
        groups.add(Finding("ML601", texts[0], Place.of(texts[1]), texts[2], row=texts[3]), texts[4])
        causes = [{**cause.to_json(), "text": cause.text(FILE_WIDTH)} for cause in groups]
        summary.unlink(missing_ok=True)
        case = JudgedCase(texts[5], "failed")
        add_job_summary(Judged("mistral-lora check", causes, [case], texts[0], known=[texts[1]]))
        page = rendered(summary.read_text())
        assert page.faults() == [], number
        assert page.tags.count("td") == 4, number
        counts.count("cases")
