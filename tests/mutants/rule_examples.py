"""The examples of the rules as their pages show them, made again from the broken artifacts of the benches."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gallery import benches, examples, fired

from pytest_mistral_lora.chat.kinds.records import record_kind
from pytest_mistral_lora.conformance.finding import Finding

SHOWN_AS = {
    "lora": "lora-out",
    "adapter": "lora-out",
    "base": "models/base",
    "merged": "merged",
    "checkpoint": "checkpoints/my-mistral",
    "goldens": "tests/goldens",
    "lines.jsonl": "encoded.jsonl",
}
"""The names that files and folders of a bench have in the documentation."""

LONGEST_ROW = 4000
"""Most characters of a row that a page shows."""

TABLE_BEGINS = re.compile(r"\d+ tokens expected, \d+ found; the first difference is at token \d+")


@dataclass(frozen=True)
class MadeExample:
    """The recorded keys of an example, and the rules that fired."""

    row: str
    table: str
    finding: str
    fired: frozenset[str]


def make_example(subject: str, rule_id: str, folder: Path) -> MadeExample:
    """Break a rule below an empty folder, and return its finding as the pages show it."""
    bench: Any = benches()[subject].BENCH
    artifact = bench.make(folder)
    examples(subject)[rule_id].broken(artifact)
    findings = bench.judge(artifact)
    finding = next((one for one in findings if one.rule == rule_id), None)
    if finding is None:
        said = ", ".join(sorted(fired(findings))) or "no rule"
        raise AssertionError(
            f"`broken` of the example {rule_id} (tests/mutants/examples_{subject}.py) fires {said}: does a case of "
            f"the subject collect findings of {rule_id}?"
        )
    lines, table = [f"{rule_id} {str(finding.place) + ': ' if str(finding.place) else ''}{finding.words}"], []
    if finding.expected:
        lines.append(f"  expected: {finding.expected}")
    for line in finding.detail.splitlines():
        in_table = TABLE_BEGINS.fullmatch(line) or (table and line.startswith(("  ", "- ", "+ ", "> ", "… ")))
        (table if in_table else lines).append(line if in_table else f"  {line}")
    return MadeExample(
        row=_row(finding, artifact.get("folder", folder)),
        # a bench of rows can show the tokens of a finding that has no table of its own
        table="\n".join(table) or (bench.table(artifact) if hasattr(bench, "table") else ""),
        finding=_with_documented_names("\n".join(lines), folder),
        fired=frozenset(fired(findings)),
    )


def _row(finding: Finding, home: Path) -> str:
    """Return the row of a finding, or else the line of the file that it names; some names are relative to a folder."""
    place = re.match(r"(.+\.jsonl):(\d+)", str(finding.place))
    if finding.row or not place:
        return finding.row
    line = (home / place[1]).read_text(encoding="utf-8").splitlines()[int(place[2]) - 1]
    row = json.loads(line)
    keys = ("messages", "tools") if "messages" in row else record_kind(row).keys
    text = json.dumps({key: value for key, value in row.items() if key in keys}, ensure_ascii=False)
    return text if len(text) <= LONGEST_ROW else ""


def _with_documented_names(text: str, folder: Path) -> str:
    text = re.sub(rf"{re.escape(str(folder))}/train-[\w-]+/", f"{folder}/", text)
    for name, shown in SHOWN_AS.items():
        text = re.sub(rf"{re.escape(str(folder))}/{re.escape(name)}(?![\w.])", shown, text)
    spec = find_spec("mistral_common")
    assert spec is not None
    assert spec.origin is not None
    return text.replace(f"{folder}/", "").replace(str(Path(spec.origin).parents[1]), "site-packages")
