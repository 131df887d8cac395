"""The checks of a runner on what it gave: its rows are written here as another worker of the session left them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.runner import checks
from pytest_mistral_lora.conformance.targets import RunnerTarget, Target
from pytest_mistral_lora.records.goldens import packaged_cases


def judged(folder: Path, *, refused: bool) -> dict[str, Result]:
    script = folder / "mine.py"
    script.touch()
    target = RunnerTarget(f"{folder.name}-mine", runner=str(script), judge=Target("spm-v3"))
    lines = []
    for number, row in enumerate(case.row for case in packaged_cases() if case.fits(target.oracle)):
        encoded = target.oracle.encode(row)
        made = {**row.to_json(), "input_ids": encoded.input_ids, "labels": encoded.labels}
        lines.append({"row": number, **({"error": "no"} if refused else made)})
    (folder / f"{target.name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{target.name}.json").write_text(json.dumps({"ran_under": {}, "refused": len(lines) * refused}))
    settings = Settings(1, None, "cpu", True, (), False, folder)
    return {check.case: check.run() for check in checks(target, settings)}


@pytest.mark.parametrize("refused", [True, False])
def test_rows_that_the_runner_refuses_pass_no_check(refused: bool, tmp_path: Path) -> None:
    results = judged(tmp_path, refused=refused)
    assert {finding.rule for one in results.values() for finding in one.findings} == ({"ML502"} if refused else set())
    assert bool(results["all-rows"].not_checked) == refused
    passed = {case for case, one in results.items() if not one.findings and not one.not_checked}
    assert passed == {"extraction"} if refused else len(passed) > 40
