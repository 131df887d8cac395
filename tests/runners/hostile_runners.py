"""Runners that do what a runner must not: each is a script of the documented interface."""

from __future__ import annotations

from pathlib import Path

_HEAD = """\
import argparse, json, os, subprocess, sys, time
parser = argparse.ArgumentParser()
for name in ("rows", "checkpoint", "config", "output"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
rows = [json.loads(line) for line in open(given.rows, encoding="utf-8")]
lines = [{"row": n, "input_ids": [1, n], "labels": [-100, n]} for n, row in enumerate(rows)]
def write(lines):
    with open(given.output, "w") as output:
        output.writelines((line if isinstance(line, str) else json.dumps(line)) + "\\n" for line in lines)
"""

SOUND = "write([{'environment': {'mine': '1.0'}}, *lines])"
TELLS = "write([{'environment': {'mine': '1.0'}}, {'note': 'two files were read'}, *lines])"
REORDERS = "write(lines[::-1])"
DROPS = "write(lines[:1] + lines[2:])"
REFUSES = "lines[1] = {'row': 1, 'error': 'too long'}; write(lines)"
DOUBLES = "write([*lines, lines[1]])"
HANGS = """\
print("waiting for a lock", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(given.config + ".child", "w").write(str(child.pid))
time.sleep(600)
"""
LEAVES_A_CHILD = """\
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(given.config + ".child", "w").write(str(child.pid))
write(lines)
"""
GARBAGE = {
    "no JSON": "write(lines + ['{'])",
    "a list": "write([[1, 2]])",
    "a row that is not there": "write([{**lines[0], 'row': 99}])",
    "a row without a number": "write([{'input_ids': [], 'labels': []}])",
    "ids that are texts": "write([{**lines[0], 'input_ids': ['1']}])",
    "ids that are no list": "write([{**lines[0], 'labels': None}])",
    "no file": "print('done')",
    "binary": "open(given.output, 'wb').write(bytes(range(256)) * 50)",
}
CRASHES = "sys.stderr.write('first\\n\\x1b[31mValueError: no such template\\n'); sys.exit(7)"
IS_KILLED = "os.kill(os.getpid(), 9)"


def script(folder: Path, body: str) -> Path:
    """Write a runner, and return its path."""
    path = folder / "mine.py"
    path.write_text(_HEAD + body)
    return path
