"""The mutants of encoded rows, judged by their ids and labels alone: what they become stands in without_messages.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_encoded as bench
import pytest
from gallery import Artifact, Mutant, mutants

FOUND = Path(__file__).with_name("without_messages.md")

pytestmark = pytest.mark.gallery


def judged(artifact: Artifact) -> list[str]:
    """Return the findings of the lines of an artifact without their messages and their dataset."""
    artifact = artifact | {key: [without_messages(line) for line in artifact[key]] for key in ("lines", "packed")}
    return sorted({finding.rule for finding in bench.judge_files(artifact, dataset=())})


def without_messages(line: Any) -> Any:
    if not isinstance(line, dict):
        return line
    texts = ("messages", "conversations", "tools", "prompt", "chosen", "rejected", "completion")
    return {key: value for key, value in line.items() if key not in texts}


def test_a_sound_artifact_breaks_no_rule_without_messages(tmp_path: Path) -> None:
    assert judged(bench.BENCH.make(tmp_path)) == []


def test_each_mutant_is_found_without_messages_or_listed(tmp_path: Path) -> None:
    lines = ["| the fault | with messages | without |", "|---|---|---|"]
    # a harness always has the messages of a prompt
    of_rows = [mutant for mutant in mutants(bench) if mutant.change.__module__ != "mutants_encoded_prompts"]
    for number, mutant in enumerate(of_rows):
        found = found_without(mutant, tmp_path / str(number))
        if found != sorted(mutant.fires):
            text = " ".join((mutant.change.__doc__ or "").split())
            lines.append(f"| {text} | {', '.join(sorted(mutant.fires))} | {', '.join(found) or 'not found'} |")
    assert FOUND.read_text("utf-8") == "\n".join(lines) + "\n"


def found_without(mutant: Mutant, folder: Path) -> list[str]:
    folder.mkdir()
    artifact = bench.BENCH.make(folder)
    mutant.change(artifact)
    return judged(artifact)
