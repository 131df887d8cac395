"""Encoded rows on disk: one folder for what was encoded once, of the same rows, by the same tokenizer, in the same way.

Folders are in the cache folder (`records/cache.py`). Each can be removed, and is made anew when needed.
The `.arrow` files are Arrow streams: `datasets.Dataset.from_file` opens them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pytest_mistral_lora import __version__
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.data_stats import Figures
from pytest_mistral_lora.records.files import cache_folder, finished_folder, listing, read_json, write_json
from pytest_mistral_lora.records.hashing import canonical_json, sha256_bytes, sha256_file
from pytest_mistral_lora.training.rows.encoding import Encoded, Plan
from pytest_mistral_lora.training.rows.table import ArrowFile, RowTable

FORMAT = 1
"""Changes with the columns of the files, and with what a key does not say."""

SIDES = ("train", "held_out")
_FIGURES = "figures.json"
_LIBRARIES = {"mistral-common": ("mistral-common",), "chat-template": ("transformers", "tokenizers", "jinja2")}
_log = logging.getLogger(__name__)

Sides = tuple[tuple[RowTable, Figures], tuple[RowTable, Figures]]
Sink = Callable[[Any], None]
Encode = Callable[[tuple[Sink, Sink]], Encoded]


def cache_key(plan: Plan, encoder: Encoder, sha256: Sequence[str], held: Sequence[bool]) -> str:
    """Return what names encoded rows: everything that they depend on, hashed.

    Args:
        plan: How rows are encoded.
        encoder: The plan's backend.
        sha256: Hash of each data file's bytes, in order.
        held: Whether each file is held out as a whole.
    """
    own_template = plan.backend == "chat-template"
    parts = {
        "format": FORMAT,
        "version": __version__,
        "libraries": {name: version(name) for name in _LIBRARIES[plan.backend]},
        "files": list(zip(sha256, held, strict=True)),
        "backend": plan.backend,
        "tokenizer": encoder.tokenizer.files.digests if own_template else encoder.tokenizer.oracle.sha256,
        "template": sha256_bytes(encoder.template.source.encode()) if own_template else None,
        "policy": asdict(plan.policy),
        "held_out": plan.held_out,
    }
    return sha256_bytes(canonical_json(parts))[:32]


def cached(key: str, encode: Encode, *, trusted: bool = False) -> tuple[Sides, list[int]]:
    """Return encoded rows from the cache; they are encoded first if they are not there, or damaged.

    Of several processes that ask for the same key one encodes; the others wait for it.

    Args:
        key: What `cache_key` returned.
        encode: Encodes the rows into two sinks of Arrow batches, as `encode_files` does.
        trusted: Whether another process of this run has looked for damage already; only sizes are compared then.

    Returns:
        Table and figures of both sides, and the number of rows of each data file.

    Raises:
        InputError: If the cache cannot be written.
    """
    folder = cache_folder() / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{key}.lock")):
            if not _is_whole(folder, trusted=trusted):
                _remove(folder)
                with finished_folder(folder) as unfinished:
                    _fill(unfinished, encode)
            data = read_json(folder / _FIGURES)["content"]
    except OSError as error:
        raise InputError(
            f"encoded rows cannot be kept here: {error.strerror or error}",
            place=str(folder.parent),
            next_step="Make room, or set MISTRAL_LORA_CACHE to another folder.",
        ) from error
    train, held_out = (
        (RowTable(folder / f"{side}.arrow"), Figures.from_json(data["sides"][side])) for side in SIDES
    )  # fmt: skip
    return (train, held_out), data["rows"]


def in_memory(encode: Encode) -> tuple[Sides, list[int]]:
    """Return what `cached` returns for rows that are few: nothing is kept on disk."""
    import pyarrow as pa

    batches: tuple[list[Any], list[Any]] = ([], [])
    (train, held_out), rows = encode((batches[0].append, batches[1].append))
    tables = [RowTable(pa.Table.from_batches(side)) for side in batches]
    return ((tables[0], train), (tables[1], held_out)), rows


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _log.info("another process encodes these rows: waiting for it (%s)", file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove(folder: Path) -> None:
    """Remove what a process left that was killed, and what is damaged; the lock is ours, so nobody writes there."""
    for left in (folder, *folder.parent.glob(f".{folder.name}.*")):
        shutil.rmtree(left, ignore_errors=True)


def _is_whole(folder: Path, *, trusted: bool) -> bool:
    try:
        data = read_json(folder / _FIGURES)
        if data["sha256"] != sha256_bytes(canonical_json(data["content"])):
            raise InputError("is not what was written", place=str(folder / _FIGURES))
        for name, recorded in data["content"]["files"].items():
            file = folder / name
            if file.stat().st_size != recorded["size"] or not (trusted or sha256_file(file) == recorded["sha256"]):
                raise InputError("is not what was written", place=str(file))
    except (OSError, InputError, KeyError, TypeError) as error:
        if folder.exists():
            _log.warning("encoded rows are damaged, and are made anew: %s", error)
        return False
    return True


def _fill(folder: Path, encode: Encode) -> None:
    with ArrowFile(folder / "train.arrow") as train, ArrowFile(folder / "held_out.arrow") as held_out:
        figures, rows = encode((train.write, held_out.write))
    files = listing(folder)
    sides = {side: one.to_json() for side, one in zip(SIDES, figures, strict=True)}
    content = {"files": files, "rows": rows, "sides": sides}
    write_json(folder / _FIGURES, {"content": content, "sha256": sha256_bytes(canonical_json(content))})
