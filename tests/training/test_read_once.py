"""Each command reads the record of a folder once."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from forked import run_forked
from tiny_runs import CONVERSATIONS, write_rows

from pytest_mistral_lora.training.run import RunResult

COUNT = """
import contextlib, io, json, os, sys
from collections import Counter

import peft, torch, transformers
from transformers import MistralForCausalLM, Trainer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.training import generate, merge

opened = Counter()


def count(event, given):
    # one with an opener of its own is reported by `os.open`, too, which gives no mode
    if event == "open" and isinstance(given[0], str) and given[1] is not None:
        opened[os.path.realpath(given[0])] += 1


# each command in a process of its own, which has imported the libraries
for name, (folder, *words) in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        sys.addaudithook(count)
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
        print(json.dumps([name, code, {name: opened[os.path.join(folder, name)] for name in os.listdir(folder)}]))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""
COMMANDS = {
    "smoke --rows": ("smoke", "{adapter}", "--base", "{base}", "--rows", "{rows}", "--max-new-tokens", "2"),
    "smoke": ("smoke", "{adapter}", "--base", "{base}"),
    "check": ("check", "{adapter}", "--base", "{base}"),
    "verify": ("verify", "{adapter}", "--base", "{base}"),
    "merge": ("merge", "{adapter}", "{adapter}-merged", "--base", "{base}"),
}


@pytest.fixture(scope="module")
def counted(
    run: RunResult, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, dict[str, int], str]]:
    """The exit code of each command, how often it opened each file of its adapter, and the errors of all."""
    folder = tmp_path_factory.mktemp("commands")
    given = {"base": base, "rows": write_rows(folder / "rows.jsonl", CONVERSATIONS[:1])}
    commands = {}
    for name, words in COMMANDS.items():
        adapter = shutil.copytree(run.output, folder / name.replace(" ", "") / "adapter")
        commands[name] = [str(adapter), *(word.format(**given, adapter=adapter) for word in words)]
    done = run_forked([sys.executable, "-c", COUNT, json.dumps(commands)])
    lines = map(json.loads, done.stdout.splitlines())
    return {name: (code, opened, done.stderr) for name, code, opened in lines}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_manifest_is_read_once(name: str, counted: dict[str, tuple[int, dict[str, int], str]]) -> None:
    code, opened, errors = counted[name]
    assert code == 0, errors
    assert opened["manifest.json"] == 1
