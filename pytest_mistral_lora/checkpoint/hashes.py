"""SHA-256 of files and bytes, in hex, as `sha256sum` prints it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pytest_mistral_lora.chat.reading import open_regular


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex, as `sha256sum` prints it.

    Raises:
        InputError: If the file cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of one file's bytes, or of several files: over their hex digests in order, one a line.

    For several, `sha256sum FILES | cut -d" " -f1 | sha256sum` prints the same.

    Raises:
        InputError: If a file cannot be read.
    """
    return joint_sha256([sha256_file(path) for path in paths])


def joint_sha256(digests: Sequence[str]) -> str:
    """Return the result of `sha256_files` for files with these hashes."""
    return digests[0] if len(digests) == 1 else sha256_bytes("".join(f"{digest}\n" for digest in digests).encode())
