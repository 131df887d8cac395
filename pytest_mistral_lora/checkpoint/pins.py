"""Pinned revisions: the files of a Hub repository at one exact commit.

A branch or a tag can move, so only a full commit is a pin. A cached file is hashed when it is used, and
compared with the commit's list of files, from the endpoint or from the note of huggingface_hub's download.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from pytest_mistral_lora.checkpoint.hub_cache import COMMIT, Listing, check_file, kept_listing, weight_names
from pytest_mistral_lora.errors import PinError
from pytest_mistral_lora.places import NOWHERE, Place

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "params.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "tokenizer.model",
    "*.model.v[0-9]*",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""Files to fetch without weights: names, and patterns of `fnmatch` (whose `*` crosses folders)."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
"""Files to fetch beside `TEXT_FILES` with weights."""

_WANTED = {False: [*TEXT_FILES], True: [*TEXT_FILES, *WEIGHT_FILES]}
"""All files to fetch, by whether weights are wanted."""

NEVER = (
    # code, and pickles, which run code when they are read
    "*.py",
    "*.pyc",
    "*.so",
    "*.pkl",
    "*.pickle",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    # in a subfolder: those of another model or of a training checkpoint
    "*/*.safetensors*",
    # a second copy of the weights, for mistral-inference
    "consolidated*",
)
"""Files that are never fetched, even if they match another pattern."""

# a hung endpoint must not hang a test session, and a complete cache is enough without its answer
_SECONDS = 10.0


def check_revision(revision: str, *, place: Place = NOWHERE, repo: str = "") -> str:
    """Return `revision` if it is a pin: a full commit of 40 lower-case hex digits.

    Args:
        revision: The revision of a recipe.
        place: Its key and file, for the error.
        repo: If given, the error for a branch or tag names its commit; the endpoint or the cache is asked.

    Raises:
        PinError: If it is a branch, a tag, a short or upper-case hash, or a made-up commit such as all zeros.
    """
    if COMMIT.fullmatch(revision) is None:
        raise PinError(
            f"revision {revision!r} is not a pin",
            place=place,
            expected="a full commit: 40 lower-case hex digits",
            next_step=_how_to_pin(repo, revision),
        )
    # zeros, or a short repeated pattern: never a real SHA-1
    if any(revision.startswith(revision[period:]) for period in range(1, 21)):
        found = f"revision {revision!r} is a placeholder, not a commit"
        raise PinError(found, place=place, next_step=_how_to_pin(repo, "main"))
    return revision


def resolve(repo: str, revision: str, *, weights: bool, verify: bool = False, place: Place = NOWHERE) -> Path:
    """Return the local folder with a Hub repository's files at exactly this commit, fetched if they are not cached.

    If you are offline, or the endpoint does not answer or refuses access, a complete copy in the cache is enough.

    Args:
        repo: The repository's id, `owner/name`.
        revision: The commit.
        weights: Whether to fetch the safetensors weights, too.
        verify: Whether to hash weights as well, which reads all of them; the other files are hashed every time.
        place: The key and file of the pin, for errors.

    Raises:
        PinError: If `revision` is not a pin, the commit's files are not available, or a cached file differs from it.
    """
    check_revision(revision, place=place, repo=repo)
    request = _Request(repo, revision, weights, place)
    listing, trouble = request.listing()
    folder = request.download(trouble)
    if listing is None:
        listing = kept_listing(folder)
    # a link to a folder counts as a file: `is_dir` would follow it, and its content would go unchecked
    files = [file for file in sorted(folder.rglob("*")) if file.is_symlink() or not file.is_dir()]
    names = [file.relative_to(folder).as_posix() for file in files]
    hashed = {name for name in request.wanted(names) if verify or not name.endswith(".safetensors")}
    for name in names:
        check_file(folder / name, folder, listing, content=name in hashed)
    # an interrupted download, or one without weights
    here = set(request.wanted(names))
    needed = set(request.wanted(listing or ())) | set(weight_names(folder) if weights else ())
    missing = ", ".join(sorted(needed - here)) or ("" if here else "configuration or tokenizer file")
    if missing and trouble is not None:
        raise request._because(trouble, f"{missing} missing in {folder}; ")
    if missing:
        raise PinError(f"{repo} at {revision} has no {missing}", place=place)
    return folder


@dataclass(frozen=True)
class FoundCommit:
    """The commit of a branch or tag.

    Attributes:
        commit: 40 hex digits.
        source: `hub`: the newest commit now; `cache`: the newest when last fetched; `given`: the name itself is a
            commit, and the Hub was not asked.
    """

    commit: str
    source: Literal["hub", "cache", "given"]


def find_commit(repo: str, name: str = "main", *, place: Place = NOWHERE, pinned: str = "") -> FoundCommit:
    """Return the commit of a branch or tag of a Hub repository; offline, the last fetched one.

    Args:
        repo: The repository's id, `owner/name`.
        name: The branch, the tag, or a commit.
        place: The key and file that name them, for errors.
        pinned: The words after `mistral-lora pin` that ask for it; by default, repository and branch.

    Raises:
        PinError: If the repository, branch or tag does not exist, or neither Hub nor cache has the answer.
    """
    from huggingface_hub import constants, errors

    try:
        return FoundCommit(_asked_commit(repo, name), "hub")
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise _Request(repo, name, weights=False, place=place)._because(error) from error
    except Exception as error:  # the types of requests or of httpx, by the version of huggingface_hub, and its own
        if COMMIT.fullmatch(name):
            return FoundCommit(name, "given")
        if (cached := _fetched_commit(repo, name)) is not None:
            return FoundCommit(cached, "cache")
        page = f"Or copy the commit from {constants.ENDPOINT}/{repo}/commits/{name}"
        if not isinstance(error, errors.OfflineModeIsEnabled):
            reason = _Request(repo, name, weights=False, place=place)._because(error)
            raise PinError(reason.found, place=place, next_step=f"{reason.next_step} {page}") from error
        found = f"offline mode is on (HF_HUB_OFFLINE), and {name} of {repo} is not in {constants.HF_HUB_CACHE}"
        command = f"HF_HUB_OFFLINE=0 mistral-lora pin {pinned or shlex.quote(f'{repo}@{name}')}"
        raise PinError(found, place=place, next_step=f"Online: {command}. {page}") from error


def _asked_commit(repo: str, name: str) -> str:
    """Ask the endpoint for the commit of a branch or tag; any error of huggingface_hub or its HTTP library passes."""
    from huggingface_hub import HfApi

    commit = HfApi().model_info(repo, revision=name, timeout=_SECONDS).sha
    if not commit or COMMIT.fullmatch(commit) is None:
        raise ValueError(f"commit {commit!r}")
    return commit


@dataclass(frozen=True)
class _Request:
    """A repository at one commit, with or without weights."""

    repo: str
    revision: str
    weights: bool
    place: Place

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Filter names as `snapshot_download` does."""
        allowed = [name for name in names if any(fnmatch(name, pattern) for pattern in _WANTED[self.weights])]
        return [name for name in allowed if not any(fnmatch(name, pattern) for pattern in NEVER)]

    def listing(self) -> tuple[Listing | None, Exception | None]:
        """Ask the endpoint for the commit's files; return None and the reason if it does not answer."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            info = HfApi().model_info(self.repo, revision=self.revision, files_metadata=True, timeout=_SECONDS)
        except RevisionNotFoundError as error:
            # the cache is not asked: files under this commit there would not be from this repository
            raise self._because(error) from error
        except Exception as error:
            # the types of requests or of httpx, by the version of huggingface_hub, and its own
            return None, error
        if info.sha != self.revision:
            raise PinError(f"{self.repo} answers with commit {info.sha} to {self.revision}", place=self.place)
        return {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()}, None

    def download(self, trouble: Exception | None) -> Path:
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                self.repo,
                revision=self.revision,
                allow_patterns=_WANTED[self.weights],
                ignore_patterns=list(NEVER),
                local_files_only=trouble is not None,
            )
        except Exception as error:
            raise self._because(trouble or error) from error
        # a cache from elsewhere can hold a link of this name, to the folder of another commit
        path = Path(folder)
        if path.name != self.revision or path.is_symlink():
            raise PinError(f"not the snapshot folder of commit {self.revision}", place=folder)
        return path

    def _because(self, error: BaseException, missing: str = "") -> PinError:
        """Return the error for a failure of huggingface_hub or of its HTTP library: the reason, and a next step."""
        from huggingface_hub import constants, errors

        # huggingface_hub reports "not in the cache" for failures of the network too; the cause is the failure itself
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__
        page = f"{constants.ENDPOINT}/{self.repo}"
        status = getattr(getattr(error, "response", None), "status_code", None)
        log_in = "log in with `hf auth login` or set HF_TOKEN"
        # gated before missing: GatedRepoError is a RepositoryNotFoundError
        if isinstance(error, errors.OfflineModeIsEnabled):
            call = f"resolve({json.dumps(self.repo)}, {json.dumps(self.revision)}, weights={self.weights})"
            command = "HF_HUB_OFFLINE=0 python -c " + shlex.quote(f"from {__name__} import resolve; {call}")
            cache = constants.HF_HUB_CACHE
            found = f"{self.repo} at {self.revision} is not complete in {cache}, and offline mode is on"
            next_step = f"Fetch it once: {command}"
        elif isinstance(error, errors.GatedRepoError) or status == 403:
            found, next_step = (
                f"access to {page} is gated",
                f"Accept its licence there with your account, and {log_in}.",
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            kind = "commit" if COMMIT.fullmatch(self.revision) else "branch or tag"
            found, next_step = f"{self.repo} has no {kind} {self.revision}", _how_to_pin(self.repo, "main")
        elif isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            found = f"no repository at {page}, or a private one"
            next_step = f"Check its name; for a private one, {log_in}."
        elif isinstance(error, errors.HFValidationError):
            found, next_step = f"{self.repo!r} is not the id of a Hub repository: {error}", "Write it as owner/name."
        else:
            found = f"cannot fetch {self.repo} from {constants.ENDPOINT}: {type(error).__name__}: {error}"
            next_step = "Check the network and HF_ENDPOINT, or fill the cache elsewhere and set HF_HUB_OFFLINE=1."
        return PinError(missing + found, place=self.place, next_step=next_step)


def _fetched_commit(repo: str, name: str) -> str | None:
    """Return the commit that a branch or tag had when it was last fetched; None if it is not in the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    with suppress(OSError, ValueError):
        # a branch's name may come from a file: `../` in it must not make this read another file
        refs = Path(HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "refs").resolve()
        file = (refs / name).resolve()
        commit = file.read_text(encoding="utf-8").strip() if repo and file.is_relative_to(refs) else ""
        if COMMIT.fullmatch(commit):
            return commit
    return None


def _how_to_pin(repo: str, name: str) -> str:
    """Return advice: the commit of a branch or tag, or if it cannot be found out, the way to find it."""
    if repo:
        # only advice is lost if it fails, and the types of the errors depend on the version of huggingface_hub
        with suppress(Exception):
            return f"{name} is {_asked_commit(repo, name)} now; pin that."
        if commit := _fetched_commit(repo, name):
            return f"{name} was {commit} when it was last fetched; pin that, or the commit you mean."
    return f"Print the newest: mistral-lora pin {shlex.quote(repo or 'owner/name')}"
