"""Processes that know nothing of the tests, forked from one that has imported the libraries alone.

To start Python and import torch, transformers and PEFT takes seconds of CPU time, far longer than most of what a test
asks of a new process. The first process imports the libraries and nothing of this package, and each command runs in a
copy of it, with another `PYTHONHASHSEED` than the tests have. Where the imports themselves are tested, or threads,
start a new interpreter.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

_LIBRARIES = (
    *("accelerate", "hypothesis", "mistral_common.tokens.tokenizers.mistral", "peft", "pytest", "torch"),
    *("transformers.trainer", "transformers.models.auto.tokenization_auto"),
    "transformers.models.mistral.modeling_mistral",
)
"""The libraries of the commands, with the parts of transformers that it would load when first used."""


def run_forked(
    command: Sequence[object], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of this interpreter as `subprocess.run` does, and return its exit code, output and errors.

    Args:
        command: `sys.executable`, then `-m MODULE`, `-c CODE` or the path of a script, and the arguments.
        cwd: The working directory, by default this one.
        env: The environment, by default this one. What the interpreter or torch reads at its start has no effect.
    """
    words = [*map(str, command)]
    assert words[0] == sys.executable
    if sys.platform != "linux":
        return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        asked = {"words": words[1:], "cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env)}
        server = _server()
        server.stdin.write(json.dumps({**asked, "files": [*map(str, files)]}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        output, errors = (file.read_text(encoding="utf-8") for file in files)
    return subprocess.CompletedProcess(words, code, output, errors)


@functools.cache
def _server() -> Any:
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)

    def end() -> None:
        server.communicate()

    atexit.register(end)
    return server


def _serve() -> None:
    for name in _LIBRARIES:
        import_module(name)
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            _become(asked)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


def _become(asked: Mapping[str, Any]) -> None:
    """Run what is asked in this process, and end it."""
    for number, name in enumerate((os.devnull, *asked["files"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    # a new object: the old one has read ahead
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    code = 1
    try:
        code = _run(asked["words"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(words: list[str]) -> int:
    kind, *rest = words
    try:
        if kind == "-m":
            sys.argv, sys.path[0] = rest, str(Path.cwd())
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = words, str(Path(kind).parent)
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
            return 1
        return ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    _serve()
