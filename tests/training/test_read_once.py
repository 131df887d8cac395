"""Each command reads the record of a folder once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import CONVERSATIONS, write_rows

from pytest_mistral_lora.training.run import RunResult

COUNT = """
import contextlib, io, json, os, sys
from collections import Counter

opened = Counter()


def count(event, given):
    if event == "open" and isinstance(given[0], str):
        opened[os.path.realpath(given[0])] += 1


from pytest_mistral_lora.cli import main

sys.addaudithook(count)
with contextlib.redirect_stdout(io.StringIO()):
    code = main(sys.argv[2:])
counts = {name: opened[os.path.join(sys.argv[1], name)] for name in os.listdir(sys.argv[1])}
print(json.dumps([code, counts]))
"""
COMMANDS = {
    "smoke --rows": ("smoke", "{adapter}", "--base", "{base}", "--rows", "{rows}", "--max-new-tokens", "2"),
    "smoke": ("smoke", "{adapter}", "--base", "{base}"),
    "check": ("check", "{adapter}", "--base", "{base}"),
    "verify": ("verify", "{adapter}", "--base", "{base}"),
    "merge": ("merge", "{adapter}", "{adapter}-merged", "--base", "{base}"),
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_the_manifest_is_read_once(words: tuple[str, ...], run: RunResult, base: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run.output, tmp_path / "adapter"))
    given = {"adapter": adapter, "base": base, "rows": write_rows(tmp_path / "rows.jsonl", CONVERSATIONS[:1])}
    command = [sys.executable, "-c", COUNT, str(adapter), *(word.format(**given) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, opened = json.loads(done.stdout)
    assert code == 0, done.stderr
    assert opened["manifest.json"] == 1
