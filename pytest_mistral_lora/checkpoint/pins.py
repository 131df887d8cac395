"""Pinned revisions: the files of a Hub repository at one exact commit, and of no other.

A branch or a tag can move, so only a full commit is a pin. A cached file is hashed when it is used, and
compared with the commit's own list of files, from the endpoint or from the note of huggingface_hub's download.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pytest_mistral_lora.checkpoint.hub_cache import COMMIT, Listing, check_file, kept_listing, weight_names
from pytest_mistral_lora.errors import PinError

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
"""What is fetched without weights: names, and patterns as `fnmatch` reads them (its `*` crosses folders)."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
"""What is fetched beside `TEXT_FILES` with weights."""

NEVER = (
    *("*.py", "*.pyc", "*.so", "*.pkl", "*.pickle", "*.bin", "*.pt", "*.pth", "*.ckpt"),  # code and pickles
    "*/*.safetensors*",  # another model's, or a checkpoint's
    "consolidated*",  # the same weights once more, for mistral-inference
)
"""What is never fetched, whatever else it matches."""

_SECONDS = 10.0


def check_revision(revision: str, *, place: str = "", repo: str = "") -> str:
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
    if any(revision.startswith(revision[period:]) for period in range(1, 21)):
        found = f"revision {revision!r} is a placeholder, not a commit"
        raise PinError(found, place=place, next_step=_how_to_pin(repo, "main"))
    return revision


def resolve(repo: str, revision: str, *, weights: bool, verify: bool = False, place: str = "") -> Path:
    """Return the local folder with a Hub repository's files at exactly this commit, fetched if they are not cached.

    If you are offline, or the endpoint does not answer or refuses access, a complete copy in the cache is enough.

    Args:
        repo: The repository's id, `owner/name`.
        revision: The commit.
        weights: Whether the safetensors weights are wanted too; without, none is fetched.
        verify: Whether to hash weights as well, which reads all of them; the other files are hashed every time.
        place: The key and file of the pin, for errors.

    Raises:
        PinError: If `revision` is not a pin, or the commit's files cannot be had, or a cached file is not the commit's.
    """
    check_revision(revision, place=place, repo=repo)
    request = _Request(repo, revision, weights, place)
    listing, trouble = request.listing()
    folder = request.download(trouble)
    if listing is None:
        listing = kept_listing(folder)
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if _is_entry(file)]
    hashed = {name for name in request.wanted(names) if verify or not name.endswith(".safetensors")}
    for name in names:
        check_file(folder / name, folder, listing, content=name in hashed)
    request.check_complete(folder, names, listing, trouble)
    return folder


@dataclass(frozen=True)
class _Request:
    """A repository at one commit, with or without weights."""

    repo: str
    revision: str
    weights: bool
    place: str

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Filter names as `snapshot_download` does."""
        allowed = (name for name in names if _matches(name, self.patterns()))
        return [name for name in allowed if not _matches(name, NEVER)]

    def patterns(self) -> list[str]:
        return [*TEXT_FILES, *WEIGHT_FILES] if self.weights else [*TEXT_FILES]

    def listing(self) -> tuple[Listing | None, Exception | None]:
        """Ask the endpoint for the commit's files; return None and the reason if it does not answer."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            info = HfApi().model_info(self.repo, revision=self.revision, files_metadata=True, timeout=_SECONDS)
        except RevisionNotFoundError as error:  # whatever the cache holds under this commit is not from there
            raise self._because(error) from error
        except Exception as error:  # the types of requests or of httpx, by version, and huggingface_hub's own
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
                allow_patterns=self.patterns(),
                ignore_patterns=list(NEVER),
                local_files_only=trouble is not None,
            )
        except Exception as error:
            raise self._because(trouble or error) from error
        path = Path(folder)
        if path.name != self.revision or path.is_symlink():
            raise PinError(f"not the snapshot folder of commit {self.revision}", place=folder)
        return path

    def check_complete(
        self, folder: Path, names: Iterable[str], listing: Listing | None, trouble: Exception | None
    ) -> None:
        """Refuse a snapshot without all that was asked for: an interrupted download, or one without weights."""
        here = set(self.wanted(names))
        needed = set(self.wanted(listing or ())) | set(weight_names(folder) if self.weights else ())
        missing = ", ".join(sorted(needed - here)) or ("" if here else "configuration or tokenizer file")
        if missing and trouble is not None:
            raise self._because(trouble, f"{missing} missing in {folder}; ")
        if missing:
            raise PinError(f"{self.repo} at {self.revision} has no {missing}", place=self.place)

    def _because(self, error: BaseException, missing: str = "") -> PinError:
        found, next_step = self._explain(error)
        return PinError(missing + found, place=self.place, next_step=next_step)

    def _explain(self, error: BaseException) -> tuple[str, str]:
        """Return the reason and the next step for an error of huggingface_hub or of its HTTP library."""
        from huggingface_hub import constants, errors

        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__
        page = f"{constants.ENDPOINT}/{self.repo}"
        status = getattr(getattr(error, "response", None), "status_code", None)
        log_in = "log in with `hf auth login` or set HF_TOKEN"
        if isinstance(error, errors.OfflineModeIsEnabled):
            found = (
                f"{self.repo} at {self.revision} is not complete in {constants.HF_HUB_CACHE}, and offline mode is on"
            )
            return found, f"Fetch it once: {self._command()}"
        if isinstance(error, errors.GatedRepoError) or status == 403:
            return f"access to {page} is gated", f"Accept its licence there with your account, and {log_in}."
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self.repo} has no commit {self.revision}", _how_to_pin(self.repo, "main")
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            return f"no repository at {page}, or a private one", f"Check its name; for a private one, {log_in}."
        if isinstance(error, errors.HFValidationError):
            return f"{self.repo!r} is not the id of a Hub repository: {error}", "Write it as owner/name."
        found = f"cannot fetch {self.repo} from {constants.ENDPOINT}: {type(error).__name__}: {error}"
        return found, "Check the network and HF_ENDPOINT, or fill the cache elsewhere and set HF_HUB_OFFLINE=1."

    def _command(self) -> str:
        call = f"resolve({json.dumps(self.repo)}, {json.dumps(self.revision)}, weights={self.weights})"
        return "HF_HUB_OFFLINE=0 python -c " + shlex.quote(f"from {__name__} import resolve; {call}")


def _is_entry(file: Path) -> bool:
    return file.is_symlink() or not file.is_dir()


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _how_to_pin(repo: str, name: str) -> str:
    """Return advice: the commit of a branch or tag, or if it cannot be found out, the way to find it."""
    if repo and (commit := _asked(repo, name)):
        return f"{name} is {commit} now; pin that."
    if repo and (commit := _remembered(repo, name)):
        return f"{name} was {commit} when it was last fetched; pin that, or the commit you mean."
    code = f"import huggingface_hub as hub; print(hub.model_info({json.dumps(repo or 'owner/name')}).sha)"
    return f"Copy the full commit from the repository's history, or print the newest: python -c {shlex.quote(code)}"


def _asked(repo: str, name: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(repo, revision=name, timeout=_SECONDS).sha
    except Exception:  # only advice is lost, and the types depend on the version
        return None
    return commit if commit and COMMIT.fullmatch(commit) else None


def _remembered(repo: str, name: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    try:
        refs = Path(HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "refs").resolve()
        file = (refs / name).resolve()
        commit = file.read_text(encoding="utf-8").strip() if file.is_relative_to(refs) else ""
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None
