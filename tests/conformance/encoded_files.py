"""Files of encoded rows, each of which asks for a number, and their audit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.formats.row_sources import FileRows

Data = dict[str, Any]


def number_row(number: int) -> Data:
    return {
        "messages": [
            {"role": "user", "content": f"Number {number}?"},
            {"role": "assistant", "content": f"It is {number}."},
        ]
    }


def number_line(oracle: Oracle, number: int) -> Data:
    encoded = oracle.encode(number_row(number))
    labels = list(encoded.labels or ())
    return {"row": number, **number_row(number), "input_ids": list(encoded.input_ids), "labels": labels}


def write_lines(folder: Path, lines: Sequence[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def audit_findings(path: Path, oracle: Oracle, *dataset: Path) -> list[Finding]:
    return [finding for verdict in Audit(FileRows(path), oracle, dataset).verdicts() for finding in verdict.findings]


def audit_rules(path: Path, oracle: Oracle, *dataset: Path) -> list[str]:
    return [finding.rule for finding in audit_findings(path, oracle, *dataset)]
