"""Which files a user can trust: whether other users of the machine can write them, and the key of the user's seals."""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pytest_mistral_lora.errors import InputError

_KEY_BYTES = 32
_ROOT = 0
_UNMAPPED = 65534
"""The owner that a container shows for a user of the host that it does not know, such as the host's root."""


def shared_by(path: Path) -> str:
    """Return which folder lets other users of the machine replace what is at a path, and why; empty if none does.

    The path and each folder above it are judged, also those of the file that a link points to. Root may write
    everything. A folder above with the sticky bit, as /tmp has, protects what its owner made in it. On a system
    without such owners and modes, as Windows is, nothing is shared.

    Args:
        path: A file or a folder; what is missing is judged by the first folder above that exists.
    """
    if not hasattr(os, "geteuid"):
        return ""
    # without `..`, and with its links: somebody may replace a link as well as what it points to
    given = Path(os.path.normpath(path.absolute()))
    for named in dict.fromkeys((given, Path(os.path.realpath(path)))):
        for entry, status in _existing(named):
            if status.st_uid not in (os.geteuid(), _ROOT, _UNMAPPED):
                return f"{entry} belongs to another user (uid {status.st_uid})"
            is_safe_parent = entry != named and status.st_mode & stat.S_ISVTX
            if not stat.S_ISLNK(status.st_mode) and not is_safe_parent and _others_write(status):
                return f"other users can write {entry} (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def _existing(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield a path and the folders above it, as far as they exist, each with its own state, not that behind a link."""
    for entry in (path, *path.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            yield entry, entry.lstat()


def _others_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_private(status.st_gid)


def _is_private(group: int) -> bool:
    """Return whether nobody else is in a group: many systems give each user one, which can write their folders."""
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        # a container that knows neither its user nor the group by name
        return group in (_ROOT, os.geteuid())
    return found.gr_name in (user, "root") and {*found.gr_mem} <= {user, "root"}


def key_file() -> Path:
    """Return the file of the user's key: `mistral-lora/seal.key` in `$XDG_CONFIG_HOME`, by default `~/.config`."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111, Path raises without a home
    return Path(folder, "mistral-lora", "seal.key")


def user_key() -> bytes:
    """Return the key of the user's seals; make it at the first call.

    Raises:
        InputError: If it cannot be read or made, or other users can read or replace it.
    """
    file = key_file()
    if not file.is_absolute():
        raise InputError("is no absolute path", place=str(file), expected="a home folder, or XDG_CONFIG_HOME")
    try:
        if not os.path.lexists(file):
            _make_key(file)
        reason = shared_by(file)
        if reason:
            raise InputError(reason, place=str(file), next_step="Take the right from them, and remove the key.")
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as opened:
            status = os.fstat(handle)
            key = opened.read(_KEY_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot be read or made: {found}", place=str(file)) from error
    if hasattr(os, "geteuid") and stat.S_IMODE(status.st_mode) & 0o077:
        raise InputError("other users can read it", place=str(file), next_step="Remove it; it is made again.")
    if len(key) != _KEY_BYTES:
        raise InputError("is not a key", place=str(file), next_step="Remove it; it is made again.")
    return key


def _make_key(file: Path) -> None:
    """Write a new key whole or not at all; if another process is faster, its key stays."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(secrets.token_bytes(_KEY_BYTES))
            opened.flush()
            os.fsync(handle)
        with suppress(FileExistsError):
            # unlike a rename, a link replaces no file
            os.link(temporary, file)
    finally:
        temporary.unlink()


def seal(data: bytes, key: bytes) -> str:
    """Return the seal of bytes, as hexadecimal digits: only who has the key can make it.

    Args:
        data: The bytes.
        key: The key, from `user_key`.
    """
    return hmac.digest(key, data, "sha256").hex()


def is_sealed(data: bytes, found: object, key: bytes) -> bool:
    """Return whether a value is the seal of bytes.

    Args:
        data: The bytes.
        found: The value that stands for the seal; it may be of any type.
        key: The key, from `user_key`.
    """
    return isinstance(found, str) and hmac.compare_digest(seal(data, key).encode(), found.encode("utf-8", "replace"))
