"""The example for Ray: two workers import and judge shards, and report what one pass over all rows does."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from pytest_mistral_lora.chat.encoded import Policy
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.conformance.dataset.report import report, scan
from pytest_mistral_lora.conformance.dataset.rows import ScanPlan
from pytest_mistral_lora.formats.convert import Source, import_rows

pytest.importorskip("ray", reason="Ray is not installed here; tox run -e ray")

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray"
TEXT = "the train to the coast was late because of snow on the line and nobody knew when it would come"
WORDS = TEXT.split()


def shards(folder: Path, number: int) -> list[Path]:
    """Write shards of ShareGPT, with repeats, leaks, and rows in another form, within and across shards."""
    chosen = random.Random(0)
    paths = []
    for shard in range(number):
        talks = []
        for row in range(40):
            asked = " ".join(chosen.sample(WORDS, 12)) if row % 4 else f"What is {row // 4}?"
            answer = f"It is {row // 8}." if row % 4 == 0 else " ".join(WORDS + chosen.sample(WORDS, 3))
            asked = asked.upper() if row % 8 == 0 and shard % 2 else asked
            talks.append([{"from": "human", "value": asked}, {"from": "gpt", "value": answer}])
        paths.append(folder / f"shard-{shard}.parquet")
        pa.parquet.write_table(pa.Table.from_pylist([{"conversations": one} for one in talks]), paths[-1])
    return paths


def test_two_workers_report_what_one_pass_reports(tmp_path: Path) -> None:
    sources = shards(tmp_path, 5)
    rows = tmp_path / "rows"
    command: list[Any] = [sys.executable, EXAMPLE / "shards.py", *sources, "--rows", rows, "--tokenizer", "spm-v3"]
    command += ["--held-out", "0.2", "--max-length", "30", "--json"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1, process.stderr
    found = json.loads(process.stdout)
    plan = ScanPlan(
        shipped_tokenizer("spm-v3"), "mistral-common", Policy(30), held_out=0.2, compares=False, sketches=True
    )
    files = [DataFile(path) for path in sorted(rows.iterdir())]
    import_rows([Source(path) for path in sources], tmp_path / "rows.jsonl")
    assert b"".join(file.path.read_bytes() for file in files) == (tmp_path / "rows.jsonl").read_bytes()
    one = report(scan(plan, files, processes=1), files, plan, place="--held-out", no_comparison="not compared")
    findings = [finding.to_json() for result in one.values() for finding in result.findings]
    assert found["findings"] == json.loads(json.dumps(findings))
    assert found["figures"] == json.loads(json.dumps(dict(one["statistics"].facts)))
    assert {finding["rule"] for finding in findings} >= {"ML607", "ML608", "ML632"}
    assert found["figures"]["rows"] == 200
    assert found["figures"]["repeats"]["across_the_split"]["another_form"] > 0
