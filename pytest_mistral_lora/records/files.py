"""Files of records: hashes of rows, containment in a folder, and writing that leaves files whole or absent.

A hash frames its parts with their lengths, so that two different lists can never hash alike. A file is written beside
its target, synced and renamed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pytest_mistral_lora.chat.reading import open_regular
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes, sha256_file
from pytest_mistral_lora.checkpoint.hub_cache import link_homes
from pytest_mistral_lora.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.rows import Row


def canonical_json(value: Any) -> bytes:
    """Return canonical JSON: keys sorted, no spaces, UTF-8, finite numbers; nearly RFC 8785, in Python's key order.

    Unicode is not normalised, since that would change tokens.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_rows(rows: Iterable[Row]) -> str:
    """Return the SHA-256 of chat rows in order, regardless of line endings and of key order that changes no id."""
    return sha256_parts(map(framed_row, rows))


def sha256_ids(encoded: Iterable[Iterable[int]]) -> str:
    """Return the SHA-256 of sequences of integers (ids or labels), each as length-framed JSON."""
    return sha256_parts(map(framed_ids, encoded))


def sha256_parts(parts: Iterable[bytes]) -> str:
    """Return the SHA-256 of bytes that come in parts, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def framed_row(row: Row) -> bytes:
    """Return the bytes that `sha256_rows` hashes for one row."""
    return framed(row.canonical().encode())


def framed_ids(sequence: Iterable[int]) -> bytes:
    """Return the bytes that `sha256_ids` hashes for one sequence."""
    return framed(canonical_json(list(sequence)))


def framed(data: bytes) -> bytes:
    """Return bytes after their length, 8 bytes little-endian."""
    # without the length, the parts "ab", "c" and "a", "bc" would hash alike
    return len(data).to_bytes(8, "little") + data


def is_held_out(row: Row, fraction: float) -> bool:
    """Return whether a row is held out: its content decides, so equal rows are never on both sides of a split."""
    # 13 hex digits are 52 bits: every such integer has an exact float.
    # all keys sorted, even where their order changes ids: rows that differ only in order belong on one side
    digest = sha256_bytes(canonical_json(row.to_json()))
    return int(digest[:13], 16) / 16**13 < fraction


Written = Literal["created", "rewritten", "unchanged"]
"""The result of writing a file."""
_UNFINISHED = ".unfinished"  # a user's file or folder, such as `.lora-out.previous`, is never taken for our remains

_SECONDS_AT_WORK = 60
"""Seconds without a write after which a part of a file has no writer any more."""


def unfinished_path(path: Path) -> Path:
    """Return a new temporary name beside a path; `remove_temporaries` finds it after a kill."""
    # beside the target: a rename is atomic within one file system only
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, atomically: a reader sees the old file or the new one, never a part."""
    with finished_file(path) as file:
        file.write(text.encode())


@contextmanager
def finished_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path`. It becomes `path` if the block ends without an error, else it vanishes."""
    temporary = unfinished_path(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            # before the rename: else a loss of power could leave an empty file under the new name
            os.fsync(file.fileno())
        if path.is_file():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except BaseException as error:  # Ctrl-C, too, must leave no temporary file
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk is no fault of the temporary name, and a write has no name at all
            error.filename, error.filename2 = str(path), None
        raise


def set_mode_of_new_file(path: Path) -> None:
    """Give a file the mode of any new file in its folder, which the umask, or an access list of the folder, decides."""
    other = unfinished_path(path)
    try:
        other.touch(exist_ok=False)
        path.chmod(stat.S_IMODE(other.stat().st_mode))
    finally:
        other.unlink(missing_ok=True)


def path_from(folder: Path, path: Path) -> Path:
    """Return a path as reports name it: relative to the working folder if it is inside, else unchanged."""
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def require_writable(path: Path, is_ours: Callable[[Path], bool] | None = None) -> Path:
    """Return the path of a file that a command writes last, if it can be written and overwrites no other's work.

    A file is made beside it and removed: permission bits say nothing for root, or on a read-only disk.

    Args:
        path: The file.
        is_ours: Whether an existing file that is not empty was written by the same command, so that it may be
            replaced; None if any file may be replaced, or the command refuses every existing file.

    Raises:
        InputError: If the path is not a regular file, its folder is missing or cannot be written, or the file exists
            and is not ours.
    """
    if "\0" in str(path):
        raise InputError("a path with a null character", place=str(path), expected="the name of a file")
    try:
        if path.is_dir():
            raise InputError("this is a folder", place=str(path), expected="a file")
        # a rename would put a file in the place of a device such as /dev/null
        if path.exists() and not path.is_file():
            raise InputError("this is not a regular file", place=str(path), expected="a file that can be replaced")
        if not path.parent.is_dir():
            raise InputError("no such folder", place=str(path.parent), next_step="Make it, or name another file.")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
        if is_ours is not None and not _may_replace(path, is_ours):
            found = "is there, and was not written by this command: it would be lost"
            raise InputError(found, place=str(path), next_step="Remove it, or name another file.")
    except OSError as error:
        step = "Name a file that you may write."
        raise InputError(f"cannot be written: {error.strerror}", place=str(path), next_step=step) from error
    return path


def _may_replace(path: Path, is_ours: Callable[[Path], bool]) -> bool:
    try:
        return not path.stat().st_size or is_ours(path)
    except FileNotFoundError:  # also if another process removes it at this moment
        return True


def beginning(path: Path) -> str:
    """Return the first characters of a text file, which identify the files that we wrote.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(1024).decode("utf-8", "replace")


def clash(output: Path, source: Path) -> str:
    """Return how an output and an input overlap on disk, as words behind the output's name; empty if they do not.

    Files and folders are compared, not spellings: links, hard links, `..` and, on a disk that ignores case, upper case
    lead to the same file.

    Args:
        output: A path that is written; it may be missing.
        source: A path that is read.
    """
    # unlike Path.resolve, this does not raise for a link that leads to itself
    written, read = (Path(os.path.realpath(path)) for path in (output, source))
    if written == read or _is_same(written, read):
        return "is"
    if any(_is_same(folder, read) for folder in written.parents):
        return "is inside"
    return "holds" if any(folder == written or _is_same(folder, written) for folder in read.parents) else ""


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except (OSError, ValueError):  # a path is missing, may not be read, or has a null character
        return False


def refuse_input_as_output(
    outputs: Mapping[str, Iterable[Path]], inputs: Iterable[Path], *, inside: Collection[str] = ()
) -> None:
    """Refuse a command that would overwrite one of its inputs, or write into it.

    Args:
        outputs: The paths that it writes, by the argument that names them.
        inputs: The paths that it reads.
        inside: The arguments whose output belongs in an input folder, and so may be inside it.

    Raises:
        InputError: If an output is an input, is inside one, or holds one; or if two arguments write the same file.
    """
    named = [(place, path) for place, paths in outputs.items() for path in paths]
    for source in inputs:
        for place, path in named:
            how = clash(path, source)
            if how and not (how == "is inside" and place in inside):
                found = f"{path} {how} {source}, which this command reads"
                raise InputError(found, place=place, next_step="Name another path.")
    for index, (place, path) in enumerate(named):
        for other, written in named[:index]:
            if place != other and clash(path, written):
                found = f"{path} is written for {other}, too"
                raise InputError(found, place=place, next_step="Name another path.")


def put_text(path: Path, text: str, *, keep: bool = False) -> Written:
    """Write a text file atomically, with the folders above it, and return the result.

    Args:
        path: The file.
        text: Its new content.
        keep: Leave an existing file unchanged.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        remove_temporaries(path)
        exists = path.exists()
        if exists and (keep or _content(path) == text.encode()):
            return "unchanged"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", place=str(path)) from error
    return "rewritten" if exists else "created"


def _content(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def write_json(path: Path, data: Any) -> None:
    """Write JSON for people to read and diff: indented, keys in the order given, one newline at the end."""
    write_text(path, json_text(data))


def json_text(data: Any) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def require_folder(path: Path) -> None:
    """Refuse a path that is not a folder, and suggest the most similar name beside it.

    Raises:
        InputError: If the path is missing, or is a file.
    """
    if path.is_dir():
        return
    beside = [folder.name for folder in path.parent.iterdir() if folder.is_dir()] if path.parent.is_dir() else []
    found = "a file" if path.exists() else f"no such folder{did_you_mean(path.name, beside)}"
    raise InputError(found, place=str(path), expected="the folder of an adapter or of a merged model")


def inside(folder: Path, name: str) -> Path:
    """Return a regular file of a folder.

    A link of a snapshot in the Hub's cache may lead to the blobs of that cache; any other must stay in the folder.

    Raises:
        InputError: If the folder or the file is missing, the file is not a regular file, or a link leaves the folder.
    """
    require_folder(folder)
    file = folder / name
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        # a loop of links, a name with a NUL, or a name that is too long: pathlib raises for each
        reason = "a link that leads nowhere" if os.path.lexists(file) else "no such file"
        raise InputError(reason, place=str(file)) from error
    if not any(target.is_relative_to(home) for home in link_homes(folder)):
        raise InputError(f"leads out of the folder, to {target}", place=str(file), expected="a file of the folder")
    if not target.is_file():
        found = "is a directory" if target.is_dir() else "is not a regular file"
        raise InputError(found, place=str(file), expected="a file")
    return file


def require_new(path: Path) -> None:
    """Refuse a folder to make that exists already: a finished folder is never overwritten.

    Raises:
        InputError: If there is something at the path.
    """
    if path.exists():
        raise InputError("exists already", place=str(path), next_step="Remove it or name another output folder.")


@contextmanager
def finished_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`. It becomes `path` if the block ends without an error, else it vanishes.

    Raises:
        InputError: If `path` exists already.
    """
    require_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished_path(path)
    temporary.mkdir()
    try:
        yield temporary
        # the content before the new name: else a loss of power could leave a finished folder with empty files
        for part in (*temporary.rglob("*"), temporary):
            _sync_to_disk(part)
        try:
            temporary.rename(path)
        except OSError as error:
            if not path.exists():
                raise
            # another process made it since the check above
            found, other = "was made by another process meanwhile", "Keep it, or name another output folder."
            raise InputError(found, place=str(path), next_step=other) from error
        # the new name is an entry of the parent folder
        _sync_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_to_disk(path: Path) -> None:
    if os.name == "nt":
        # Windows opens no folder, and syncs no file that is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(path: Path) -> None:
    """Remove the remains of a killed process: of `finished_folder(path)`, or of writing the file `path`.

    Several processes may write one file at once, each its own part: a part that was written to lately stays.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????{_UNFINISHED}"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
            continue
        with suppress(FileNotFoundError):  # its writer has finished it, or another process has removed it
            if time.time() - left.stat().st_mtime > _SECONDS_AT_WORK:
                left.unlink()


def listing(folder: Path) -> dict[str, dict[str, Any]]:
    """Return `size` in bytes and `sha256` of each file of a folder, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "size": path.stat().st_size}
        for path in files
    }


def cache_folder() -> Path:
    """Return `$MISTRAL_LORA_CACHE`, or else `mistral-lora` in `$HF_HOME`, by default `~/.cache/huggingface`.

    Raises:
        InputError: If the path begins with the home folder of a user who has none.
    """
    of_hub = os.environ.get("HF_HOME", "~/.cache/huggingface")
    name = "MISTRAL_LORA_CACHE" if os.environ.get("MISTRAL_LORA_CACHE") else "HF_HOME"
    path = Path(os.environ.get("MISTRAL_LORA_CACHE") or Path(of_hub, "mistral-lora"))
    try:
        return path.expanduser()
    except RuntimeError as error:
        named = os.environ.get(name)
        found = f"{str(path)!r}: there is no such home folder" if named else "there is no home folder for a cache"
        raise InputError(found, place=name, next_step="Set MISTRAL_LORA_CACHE to a folder.") from error
