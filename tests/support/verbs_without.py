"""Verbs in a process of Python from which something was taken away before it imported the package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_VERBS = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pytest_mistral_lora.cli import main

results = []
for words in json.load(sys.stdin):
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    results.append([code, out.getvalue(), err.getvalue()])
"""


def run_verbs(
    before: str, commands: Sequence[Sequence[str]], folder: Path, *, after: str = ""
) -> list[tuple[int, str, str]]:
    """Return exit code, output and errors of each command, all of one process.

    Args:
        before: The code that takes something away.
        commands: The words of each command, the verb first.
        folder: The folder that the process runs in.
        after: Code that is run behind the commands; it may append to `results`.
    """
    process = subprocess.run(
        [sys.executable, "-c", f"{before}{_VERBS}{after}\nprint(json.dumps(results))"],
        cwd=folder,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [tuple(one) for one in json.loads(process.stdout.splitlines()[-1])]
