"""The record of verdicts is the same for the same code, and shows the case whose verdict changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gallery

SCRIPT = Path(__file__).parents[2] / "scripts" / "record_verdicts.py"


def record(*words: str | Path) -> subprocess.CompletedProcess[str]:
    parts = ["encoded", "import", "guard", "serve-check"]
    command = [sys.executable, SCRIPT, *parts, "--every", "60", "--processes", "1", *words]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def test_a_changed_verdict_is_named(tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    assert record("--output", before).returncode == 0
    entries = json.loads(before.read_text())
    assert {name.partition(":")[0] for name in entries} == {"encoded", "import", "guard", "serve-check"}
    assert not entries["guard:sound"]["findings"]
    assert entries["guard:end masked"]["findings"]
    name = next(name for name, entry in entries.items() if entry.get("suite"))
    same = record("--output", after, "--against", before)
    assert (same.returncode, same.stdout) == (0, f"{len(entries)} cases, 0 differ\n")

    entries[name]["suite"] = []
    before.write_text(json.dumps(entries))
    changed = record("--output", after, "--against", before)
    assert changed.returncode == 1
    assert changed.stdout.splitlines()[0] == name
    assert changed.stdout.endswith(f"{len(entries)} cases, 1 differ\n")
