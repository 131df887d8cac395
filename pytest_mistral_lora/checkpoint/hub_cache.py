"""Check a snapshot folder of the Hub cache: every file is in the cache, and has its commit's content.

In that cache `snapshots/<commit>/<name>` links to `blobs/<etag>`, and the etag is the content's hash: git's SHA-1 of
the blob, or the SHA-256 of a file kept by LFS. huggingface_hub follows the links and never hashes again.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.weights import read_index
from pytest_mistral_lora.errors import InputError, PinError

Listing: TypeAlias = Mapping[str, str | None]
"""The files of a commit: name to content hash, in hex; None if the source does not give it."""

COMMIT = re.compile(r"[0-9a-f]{40}")
# an etag of another form, such as a proxy's, may not be a hash of the content
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_KEPT_FORMAT = 1
_SNAPSHOT = re.compile(r"/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


def snapshot_of(folder: Path) -> tuple[str, str] | None:
    """Return the repository and the commit of a snapshot in the Hub's cache; None for any other folder."""
    found = _SNAPSHOT.search(folder.resolve().as_posix())
    return (found["repo"].replace("--", "/"), found["commit"]) if found else None


def blob_folders(snapshot: Path) -> tuple[Path, Path]:
    """Return the folders that the links of a snapshot lead to."""
    # Not resolved: a folder of blobs that is a link would let every link of a foreign snapshot lead anywhere. From
    # version 2 of huggingface_hub on, a blob can itself be a link, into a store that all repositories share.
    repository = snapshot.resolve().parents[1]
    return repository / "blobs", repository.parent / "blobs"


def link_homes(folder: Path) -> tuple[Path, ...]:
    """Return the folders that may hold the target of a file of `folder`.

    A folder of unknown origin may hold links, and reading through one would read any file of this machine. So a link
    must stay in its folder. The exception is a snapshot in the Hub's cache, whose files are links to blobs.
    """
    return folder.resolve(), *(blob_folders(folder) if snapshot_of(folder) else ())


def listing_note(folder: Path) -> Path:
    """Return the file in which huggingface_hub 2 notes the files of a snapshot's commit; it may be missing."""
    return folder.parents[1] / "trees" / f"{folder.name}.json"


def kept_listing(folder: Path) -> Listing | None:
    """Return the commit's files as noted by huggingface_hub 2 during the download; None without a note.

    Earlier versions keep no such note, and then only the names of the blobs can be checked offline.
    """
    try:
        note = read_json(listing_note(folder))
        if note["format_version"] != _KEPT_FORMAT:
            return None
        listing = {name: entry.get("lfs_sha256") or entry["blob_id"] for name, entry in note["files"].items()}
        return listing if all(isinstance(digest, str) for digest in listing.values()) else None
    except (InputError, KeyError, TypeError, AttributeError):
        return None


def is_repository(name: str) -> bool:
    """Return whether a name, which may come from a file, can be the id of a repository: `../base` cannot."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return False
    return True


def cached_snapshot(repo: str, revision: str) -> Path | None:
    """Return the snapshot of a commit in the Hub's cache, its files checked against the commit; nothing is fetched.

    Weights are not hashed: a snapshot may be large, or have none at all.

    Args:
        repo: The repository's id, `owner/name`; it may come from a file.
        revision: The commit.

    Returns:
        The folder; None if it is not in the cache, or `repo` and `revision` cannot be a repository and a commit.

    Raises:
        PinError: If a file differs from the commit's.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not COMMIT.fullmatch(revision) or repo.count("/") != 1:
        return None
    try:
        file = try_to_load_from_cache(repo, "config.json", revision=revision)
    except HFValidationError:  # the name comes from a file, and may be a path, such as `../base`
        return None
    if not isinstance(file, str):
        return None
    snapshot = Path(file).parent
    listing = kept_listing(snapshot)
    for path in (Path(file), *sorted(snapshot.glob("model*.safetensors"))):
        check_file(path, snapshot, listing, content=path.suffix == ".json")
    return snapshot


def check_file(file: Path, folder: Path, listing: Listing | None, *, content: bool) -> None:
    """Check one file of a snapshot.

    Args:
        file: The file, or a link, below `folder`.
        folder: The snapshot's folder, `…/snapshots/<commit>`.
        listing: The commit's files, if known; without them, the file is compared with its blob's name.
        content: Whether to hash the file; if not, only its link is checked.

    Raises:
        PinError: If a link leaves the cache, or the commit does not have the file, or has another content for it.
    """
    name = file.relative_to(folder).as_posix()
    filed_as: str | None = None
    # caches on Windows hold files in place of links, so there is no blob's name to compare with
    if file.is_symlink():
        # Path.resolve raises on a loop of links
        target, filed_as = Path(os.path.realpath(file)), file.readlink().name
        if not target.is_file() or not any(target.is_relative_to(blobs) for blobs in blob_folders(folder)):
            raise PinError(
                f"leads out of the cache of its repository, or nowhere: {target}",
                place=str(file),
                next_step="Remove it and fetch again.",
            )
    if listing is not None and name not in listing:
        raise PinError(f"commit {folder.name} has no such file", place=str(file), next_step="Remove it.")
    expected = (listing or {}).get(name) or filed_as
    # a cache without links, offline: neither a listing nor a blob to compare with
    if expected is None or not _HASH.fullmatch(expected):
        return
    found = _digest(file, len(expected)) if content else filed_as
    if found not in (None, expected):
        raise PinError(
            f"not the file of commit {folder.name}: hash {found}",
            place=str(file),
            expected=expected,
            next_step=f"Remove it and {file.resolve()}, and fetch again.",
        )


def weight_names(folder: Path) -> list[str]:
    """Return the safetensors files that the folder's index names; `model.safetensors` if there is no index.

    Raises:
        InputError: If the index is not valid.
    """
    names: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        names |= set(read_index(index).values())
    return sorted(names) or ["model.safetensors"]


def _digest(file: Path, hex_digits: int) -> str:
    """Hash a file as git does, for an expected hash of 40 digits, or with SHA-256."""
    with file.open("rb") as content:
        if hex_digits == 64:
            return hashlib.file_digest(content, "sha256").hexdigest()
        # not for security: git names its blobs so, and a FIPS build of OpenSSL refuses SHA-1 otherwise
        digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
        while block := content.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
