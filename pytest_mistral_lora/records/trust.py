"""Which files a user can trust: whether other users of the machine can write them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

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
