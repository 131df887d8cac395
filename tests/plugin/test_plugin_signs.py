"""Signs in pytest's summary, and the switches that fail them, or fail what was not checked alone."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from pytest_mistral_lora.report.lines import LOOK_AT

Run = Callable[..., pytest.RunResult]
ANSWER = "It is a thing of this house, and it stands beside the old oven since last year."


@pytest.fixture
def options(pytester: pytest.Pytester) -> tuple[str, ...]:
    rows = [
        [
            {"role": "user", "content": f"What is thing {number}?"},
            {"role": "assistant", "content": ANSWER if number else "A boat."},
        ]
        for number in range(20)
    ]
    lines = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    (pytester.path / "rows.jsonl").write_text(lines)
    return ("--mistral-dataset=rows.jsonl", "--mistral-tokenizer=spm-v3")


def test_signs_are_listed_last_and_strict_fails_them(options: tuple[str, ...], golden: Run) -> None:
    result = golden(*options)
    assert result.ret == 0
    at = result.outlines.index(LOOK_AT)
    assert result.outlines.index("not checked:") < at
    assert result.outlines[at + 1].startswith("  ML644 rows.jsonl:2: ")
    assert "19 of 20 rows (95.0%)" in result.outlines[at + 1]
    assert not any(line.startswith("note ML644") for line in result.outlines)
    strict = golden(*options, "--mistral-fail-on=note,not-checked", "-k", "statistics")
    strict.assert_outcomes(failed=1, deselected=strict.parseoutcomes()["deselected"])
    assert golden(*options, "--mistral-fail-on=not-checked", "-k", "statistics").ret == 0


def test_what_was_not_checked_fails_alone_if_asked(golden: Run, pytester: pytest.Pytester) -> None:
    # a law of v2 and later
    chosen = ("-k", "spm-v1::mask::mistral-common-agrees or spm-v1::tokenizer::file")
    assert golden(*chosen).ret == 0
    result = golden(*chosen, "--mistral-fail-on=not-checked")
    result.assert_outcomes(passed=1, failed=1, deselected=result.parseoutcomes()["deselected"])
    command = "pytest --mistral-golden --mistral-examples 20 --mistral-fail-on=not-checked"
    command += " -k spm-v1::mask::mistral-common-agrees"
    assert f"rerun:  {command}" in result.outlines
    pytester.makeini("[pytest]\nmistral_fail_on = not-checked")
    assert golden(*chosen).ret == pytest.ExitCode.TESTS_FAILED
