"""Compare what a manifest proves with what an earlier one proved: a record with facts cut out is still valid."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import JSON_LIMIT, loads_strict
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.errors import InputError, one_line
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.git import ask_git
from pytest_mistral_lora.records.manifest import DECLARED, MANIFEST, is_foreign, parts, violations
from pytest_mistral_lora.records.notes import NOTES

_MOST_COMMITS = 50
"""The most commits to look at, of those that changed the manifest."""
_OF_ITS_OWN_FOLDER = ("kind", "files", "parent", "environment", "seal", "schema_version", *DECLARED)
"""Parts of a merged model's manifest that do not come from its adapter's."""
_WITHOUT_KEYS = ("files", "recipe")
"""Parts whose keys are not facts of the record itself."""


def less_proven_than_committed(folder: AdapterFolder) -> tuple[str, list[str]]:
    """Return the commit to compare with, and each thing that the manifest of a folder proves less than its manifest.

    The newest commit counts, or an older one whose manifest of the same weights proved more.

    Raises:
        LookupError: If Git cannot be asked, or no commit has a manifest of the folder; with the reason.
    """
    now = folder.require_manifest()
    newest, digests = "", dict[str, str]()
    for commit, before in _committed_manifests(folder.path):
        version = before.get("schema_version", 0)
        older = [f"schema version {now.version} in place of {version}"] if now.version < version else []
        lost = older + _less_of_run(before, now.data)
        # weights take long to hash: only if the result depends on them
        if lost and not _has_weights_of(folder, before, digests):
            lost = [] if newest else older + _less_of_record(before, now.data)
        if lost:
            return commit, lost
        newest = newest or commit
    if not newest:
        raise LookupError(f"no commit has this {MANIFEST}")
    return newest, []


def less_proven_than_merged(merged: Mapping[str, Any], adapter: Mapping[str, Any]) -> list[str]:
    """Return each thing that an adapter's manifest proves less than its copy in a merged model's manifest."""
    copied = {name: value for name, value in merged.items() if name not in _OF_ITS_OWN_FOLDER}
    return _losses(_missing_facts(copied, adapter))


def _committed_manifests(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the valid manifests that commits gave a folder, each with its commit, the newest first.

    Raises:
        LookupError: If Git cannot be asked.
    """
    try:
        commits = ask_git(folder, "rev-list", f"--max-count={_MOST_COMMITS}", "HEAD", "--", MANIFEST).decode().split()
    except FileNotFoundError as error:
        raise LookupError("there is no git to ask") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise LookupError(f"git cannot tell: {_reason(error)}") from error
    for commit in commits:
        blob = f"{commit}:./{MANIFEST}"
        try:
            # the stored object: a checkout would run the filters of the repository
            if int(ask_git(folder, "cat-file", "-s", blob)) > JSON_LIMIT:
                continue
            data = loads_strict(ask_git(folder, "cat-file", "blob", blob).decode())
        except (OSError, subprocess.SubprocessError, ValueError):
            continue  # the commit removed the file, or its file is not JSON
        if not is_foreign(data) and not violations(data):
            yield commit, data


def _reason(error: Exception) -> str:
    output = getattr(error, "stderr", None) or b""
    return one_line(output.decode(errors="replace")) or one_line(error)


def _has_weights_of(folder: AdapterFolder, before: Mapping[str, Any], digests: dict[str, str]) -> bool:
    """Return whether the weights in a folder are those that an earlier manifest of it lists.

    Args:
        folder: The folder.
        before: The earlier manifest.
        digests: The known hashes of files; the hashes made here are added.
    """
    listed = {name: entry for name, entry in before.get("files", {}).items() if name.endswith(".safetensors")}
    try:
        files = {name: inside(folder.path, name) for name in listed}
        if not listed or any(file.stat().st_size != listed[name]["size"] for name, file in files.items()):
            return False
        digests |= {name: sha256_file(file) for name, file in files.items() if name not in digests}
        return all(digests[name] == listed[name]["sha256"] for name in files)
    except (InputError, OSError):
        return False


def _less_of_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what a manifest of the same run proves less: facts, the seal, and files that it no longer lists."""
    return _losses(_missing_facts(before, now), _unlisted(before, now, before.get("files", {})))


def _less_of_record(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what the manifest of another run proves less: parts that each run of its kind has, the seal, the notes."""
    required = ("tokenizer", "files", "environment", "seal")
    of_kind = ("template", "dataset", "masking", "lora", "training", "evaluation")
    both_adapters = before.get("kind", "adapter") == now.get("kind") == "adapter"
    names = (*of_kind, *required) if both_adapters else required
    return _losses([name for name in names if name in before and name not in now], _unlisted(before, now, NOTES))


def _missing_facts(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the facts that one manifest has and another lacks: parts, and keys of the parts that both have."""
    missing = []
    for name in parts():
        if name not in before or name in DECLARED:  # a declaration may be taken back
            continue
        if name not in now:
            missing.append(name)
        elif isinstance(before[name], Mapping) and isinstance(now[name], Mapping) and name not in _WITHOUT_KEYS:
            missing += [f"{name}.{key}" for key in before[name] if key not in now[name]]
    return missing


def _unlisted(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    listed = before.get("files", {})
    return [name for name in names if name in listed and "files" in now and name not in now["files"]]


def _losses(missing: Sequence[str], unlisted: Sequence[str] = ()) -> list[str]:
    """Return a text for each kind of loss."""
    unrecorded = ", ".join(name for name in missing if name != "seal")
    lost = [f"not recorded: {unrecorded}"] if unrecorded else []
    lost += ["no seal"] if "seal" in missing else []
    return lost + ([f"not listed: {', '.join(unlisted)}"] if unlisted else [])
