"""How a server is asked: the limit of a request, the most open ones, and the file that keeps the answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

AT_ONCE = 4
"""The most open requests if the user names no number: a server of one's own may serve others, too."""


@dataclass(frozen=True, slots=True)
class AskingLimits:
    """How a server is asked, as options and ini keys say it.

    Attributes:
        seconds: The limit of a request, in seconds; 0 for that of the rows, and of the answers.
        at_once: The most open requests.
        kept: The file that keeps what the server answered, for a check that goes on where it was stopped; or None.
    """

    seconds: float = 0.0
    at_once: int = AT_ONCE
    kept: Path | None = None


def is_kept(file: Path) -> bool:
    """Return whether a file is one of kept answers: `serving.kept` writes it, so that a check goes on with it."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        return lines.readline(1 << 16).startswith('{"asked": ')
