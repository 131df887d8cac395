"""How the rows of a run were judged: what its manifest records, and the results that later runs take."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from pytest_mistral_lora.checkpoint.hashes import sha256_bytes
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import cache_folder, write_text
from pytest_mistral_lora.records.trust import shared_by


@dataclass(frozen=True)
class Judgement:
    """How the rows of a run were judged.

    Attributes:
        is_judged: Whether they were judged; else the user has asked for a run without it.
        accepted: The known deviations that were found, each with its `id` and its `reason`.
        notes: A line for each note.
    """

    is_judged: bool
    accepted: Sequence[Mapping[str, str]] = ()
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest records it."""
        return {"judged": self.is_judged, "accepted": [dict(known) for known in self.accepted]}


UNJUDGED = Judgement(is_judged=False)


class KeptVerdict:
    """The results of a judge in the cache, beside the encoded rows and under their key.

    Attributes:
        file: The file; None if there is no folder for it, so that nothing is kept.
    """

    def __init__(self, keys: Sequence[str], identity: Any) -> None:
        """Name the file.

        Args:
            keys: The keys of the encoded rows in the cache, those of `data` first.
            identity: That of the judge.
        """
        self.file: Path | None = None
        with suppress(InputError):
            # in ASCII: the name of a file may have bytes that are not UTF-8
            digest = sha256_bytes(json.dumps([*keys, identity], sort_keys=True).encode())
            self.file = cache_folder() / f"{keys[0]}.{digest[:32]}.verdict"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process of this machine judge, while the others wait for its results."""
        lock = None
        if self.file is not None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(f"{self.file}.lock")
                lock.acquire()
            except OSError:
                # rows in memory need no cache: without one, each process judges
                self.file = lock = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def read(self) -> str | None:
        """Return the results; None if they are missing or damaged, or other users can write them."""
        if self.file is None or shared_by(self.file):
            return None
        with suppress(OSError, UnicodeDecodeError):
            digest, _, results = self.file.read_bytes().decode("ascii").partition("\n")
            return results if digest == sha256_bytes(results.encode()) else None
        return None

    def write(self, results: str) -> None:
        """Keep the results; on a full disk they are made again in the next run."""
        if self.file is not None:
            with suppress(OSError, InputError):
                write_text(self.file, f"{sha256_bytes(results.encode())}\n{results}")
