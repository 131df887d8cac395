"""Findings with hostile texts, and the verdict that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.groups import FILE_WIDTH, FindingGroups
from pytest_mistral_lora.report.judged import Judged, JudgedCase

HOSTILE = "a, b: 100% of\r\n::add-mask::x\n##[error]y\u2028::error::z `````\x1b[31m\x00\ud800 <script>|**"
"""A text that is a workflow command, mark-up and no XML."""


def causes_of(*findings: Finding) -> list[dict[str, Any]]:
    groups = FindingGroups()
    for number, finding in enumerate(findings):
        groups.add(finding, f"spm-v3::dataset::case-{number}")
    return [{**cause.to_json(), "text": cause.text(FILE_WIDTH)} for cause in groups]


def judged(*findings: Finding) -> Judged:
    cases = [
        JudgedCase("mistral-golden.spm-v3.dataset", "failed"),
        JudgedCase("mistral-golden.spm-v3.dataset", "passed"),
        JudgedCase("mistral-golden.spm-v3.train", "skipped"),
    ]
    return Judged("mistral-lora check", causes_of(*findings), cases, "1 finding")


def write_file(folder: Path, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("{}\n{}\n{}\n")
    return path
