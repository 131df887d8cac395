"""What Python writes to disks while a test watches, by its audit events."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_MADE = ("tempfile.mkdtemp", "tempfile.mkstemp")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# a hook stays until the process ends, so there is one, and it sees nothing outside of `watched_writes`
_seen: list[str] | None = None
_installed: list[bool] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open":
        _note_open(*args)
    elif event in _CHANGES or event in _MADE:
        _seen.append(f"{event} {args[0]!r}")


def _note_open(path: Any, mode: str | None, flags: int) -> None:
    # a number is a pipe to a process, or was opened by its path before; the null device, which git is asked with for
    # the commit of a report, keeps nothing
    if flags & _WRITING and not isinstance(path, int) and path != os.devnull and _seen is not None:
        _seen.append(f"open {path!r} {mode!r}")


@contextmanager
def watched_writes() -> Iterator[list[str]]:
    """Yield the list of what is opened for writing, made, renamed or removed in the block, by any thread."""
    global _seen
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    # a module that is imported for the first time may be compiled, and kept
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    seen: list[str] = []
    _seen = seen
    try:
        yield seen
    finally:
        _seen = None
        sys.dont_write_bytecode = before
