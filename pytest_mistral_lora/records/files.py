"""Write files that are whole or absent: a temporary file beside the target, fsync, then `os.replace`."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.checkpoint.hub_cache import link_homes
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.hashing import sha256_file

Written = Literal["created", "rewritten", "unchanged"]
"""The result of writing a file."""

_RANDOM = 8  # characters that `tempfile` puts after the name of a temporary file or folder


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old file or the new one, never a part."""
    # beside the target: a rename is atomic within one file system only
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            # before the rename: after a loss of power, the new name could lead to an empty file
            os.fsync(file.fileno())
        # mkstemp lets nobody else read it
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:  # Ctrl-C, too, must leave no temporary file
        Path(temporary).unlink(missing_ok=True)
        raise


def put_text(path: Path, text: str, *, keep: bool = False) -> Written:
    """Write a text file atomically, with the folders above it, and return the result.

    Args:
        path: The file.
        text: Its new content.
        keep: Leave the file as it is, if there is one.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        there = path.exists()
        if there and (keep or path.read_bytes() == text.encode()):
            return "unchanged"
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(path)
        write_text(path, text)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", place=str(path)) from error
    return "rewritten" if there else "created"


def write_json(path: Path, data: Any) -> None:
    """Write JSON for people to read and diff: indented, keys in the order given, one newline at the end."""
    write_text(path, json_text(data))


def json_text(data: Any) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def inside(folder: Path, name: str) -> Path:
    """Return a regular file of a folder.

    A link of a snapshot in the Hub's cache may lead to the blobs of that cache; any other has to stay in the folder.

    Raises:
        InputError: If there is none, if it is no regular file, or if it leads out of the folder.
    """
    file = folder / name
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        reason = "no such file" if not file.is_symlink() else "a link that leads nowhere"
        raise InputError(reason, place=str(file)) from error
    if not any(target.is_relative_to(home) for home in link_homes(folder)):
        raise InputError(f"leads out of the folder, to {target}", place=str(file), expected="a file of the folder")
    if not target.is_file():
        raise InputError(
            "is a directory" if target.is_dir() else "is no regular file", place=str(file), expected="a file"
        )
    return file


@contextmanager
def finished_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`. It becomes `path` if the block ends without an error, else it vanishes.

    Raises:
        InputError: If `path` exists already: a finished folder is never written over.
    """
    if path.exists():
        raise InputError("exists already", place=str(path), next_step="Remove it or name another output folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        # mkdtemp lets nobody else enter it
        temporary.chmod(0o755)
        yield temporary
        # on the disk before its new name is: else a loss of power could leave a finished folder with empty files
        for part in (*temporary.rglob("*"), temporary):
            _sync_to_disk(part)
        temporary.rename(path)
        # the new name is an entry of the folder above
        _sync_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(path: Path) -> None:
    """Remove the remains of a killed process: of `finished_folder(path)`, or of writing the file `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'?' * _RANDOM}"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def listing(folder: Path) -> dict[str, dict[str, Any]]:
    """Return `size` in bytes and `sha256` of each file of a folder, by its path in there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "size": path.stat().st_size}
        for path in files
    }


def cache_folder() -> Path:
    """Return `$MISTRAL_LORA_CACHE`, or else `mistral-lora` in the folder of the Hugging Face libraries.

    That folder is `$HF_HOME`, by default `~/.cache/huggingface`.
    """
    named = os.environ.get("MISTRAL_LORA_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "mistral-lora"
