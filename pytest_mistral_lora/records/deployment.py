"""What a folder's manifest declares beside the record of its run: what production serves, and the user's evaluation.

A declaration may change after the run, and the manifest is then sealed again. The record of the run is the manifest
without declarations: its hash identifies the folder in other records, whatever is deployed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.escaping import code_span
from pytest_mistral_lora.records.addresses import without_endpoint
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.manifest import DECLARED, DEPLOYMENT, MANIFEST, NOTES_RECORD, build


def is_declared(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of `evaluation` is a command of the user: such an entry has `files`."""
    return "files" in entry


def commands_of(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the user's commands among the entries of `evaluation`."""
    return [entry for entry in manifest.get("evaluation", ()) if is_declared(entry)]


def without_declarations(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a manifest without what was declared beside the run; its notes and its seal stay."""
    parts = {name: value for name, value in manifest.items() if name not in DECLARED}
    if "evaluation" in parts:
        parts["evaluation"] = [entry for entry in parts["evaluation"] if not is_declared(entry)]
    return parts


def run_record(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest that a run without declarations has, sealed.

    Args:
        manifest: A valid manifest; one without declarations is returned as it is.
    """
    if NOTES_RECORD not in manifest:
        return dict(manifest)
    parts = {name: value for name, value in without_declarations(manifest).items() if name != "seal"}
    # the parts of a valid manifest may have another order than its file
    return build(**{**parts, "files": {**parts["files"], **manifest[NOTES_RECORD]["of_run"]}})


def hashed_files(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return an entry with hash and size for each file of a folder, by its name; None for one that is not there."""
    return {name: _entry(folder, name) for name in names}


def _entry(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        file = inside(folder, name)
        return {"sha256": sha256_file(file), "size": file.stat().st_size}
    except (InputError, OSError):
        return None


def deployed(manifest: Mapping[str, Any]) -> str:
    """Return what production serves of a folder, as a sentence of its notes; empty if that is undeclared."""
    if DEPLOYMENT not in manifest:
        return ""
    deployment, is_merged = manifest[DEPLOYMENT], manifest["kind"] == "merged"
    if deployment is None:
        return f"Production does not serve this {'model, nor its adapter' if is_merged else 'adapter'}."
    name, serves_merged = code_span(deployment["name"]), deployment["as"] == "merged"
    if is_merged:
        role = f"This folder is the served artifact {name}."
        return role if serves_merged else f"This folder is a by-product: production serves the adapter {name}."
    if serves_merged:
        return f"Production serves a merged model of this adapter as {name}; this folder is its source."
    return f"Production serves this adapter as {name}."


def conflicts(folders: Mapping[Path, Mapping[str, Any]]) -> Iterator[tuple[Path, Path, str]]:
    """Yield each two folders that declare different deployments under one name on one server, with the difference.

    An adapter and a merged model of it that declare the same deployment are one. So are two copies of a folder.

    Args:
        folders: The valid manifest of each folder.
    """
    declared = [(path, data) for path, data in folders.items() if data.get(DEPLOYMENT)]
    for index, (path, data) in enumerate(declared):
        for earlier, other in declared[:index]:
            mine, theirs = data[DEPLOYMENT], other[DEPLOYMENT]
            if mine["name"] != theirs["name"] or _address(mine) != _address(theirs):
                continue
            if mine["as"] != theirs["as"]:
                words = {"adapter": "an adapter", "merged": "a merged model"}
                yield earlier, path, f"one says that it is {words[theirs['as']]}, the other {words[mine['as']]}"
            elif adapter_of(data) != adapter_of(other):
                yield earlier, path, "they are of different adapters"
            elif (
                mine["as"] == "merged"
                and data["kind"] == other["kind"] == "merged"
                and _weights(data) != _weights(other)
            ):
                yield earlier, path, "they are different merged models of one adapter"


def _address(deployment: Mapping[str, Any]) -> str:
    return without_endpoint(str(deployment.get("server", {}).get("url", "")))


def adapter_of(manifest: Mapping[str, Any]) -> Any:
    """Return the hash of the tensors of the adapter that a manifest is about."""
    return (manifest.get("parent") or manifest.get("lora", {})).get("tensors_sha256")


def _weights(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in manifest.get("files", {}).items() if name.endswith(".safetensors")}


UNDECLARED = (
    "Its deployment is undeclared: nothing says whether production serves it, and under which name. Write it into the "
    f"recipe, such as `deployment: {{as: adapter, name: support}}`, and record it in {MANIFEST} and the notes: "
    "`mistral-lora note FOLDER --recipe recipe.yaml`."
)
"""The sentence of `DECISION.md` about a folder without a declared deployment."""
