"""Manifests that are not valid, or speak of another kind of folder."""

from __future__ import annotations

from bench_manifest import COMMIT, MANIFEST, TEMPLATE
from gallery import Artifact, mutant

from pytest_mistral_lora.checkpoint.hashes import sha256_file


def _four_keys(artifact: Artifact) -> None:
    keys = ("base", "revision", "dataset_sha256", "seed", "base_weights_sha256")
    artifact["manifest"] = {key: artifact["manifest"][key] for key in keys}


@mutant("ML701", says="not valid JSON")
def manifest_cut_off(artifact: Artifact) -> None:
    """The manifest ends early."""
    file = artifact["folder"] / MANIFEST
    file.write_text(file.read_text()[:100])


@mutant("ML701", says="is a directory")
def manifest_is_a_folder(artifact: Artifact) -> None:
    """manifest.json is a folder."""
    (artifact["folder"] / MANIFEST).unlink()
    (artifact["folder"] / MANIFEST).mkdir()


@mutant("ML701", says="leads out of the folder")
def manifest_linked_from_elsewhere(artifact: Artifact) -> None:
    """manifest.json is a link to another folder's."""
    (artifact["folder"] / MANIFEST).unlink()
    (artifact["folder"] / MANIFEST).symlink_to(artifact["merged"] / MANIFEST)


@mutant("ML701", says="$.seed")
def seed_missing(artifact: Artifact) -> None:
    """There is no seed."""
    del artifact["manifest"]["seed"]


@mutant("ML701", "I19", says='"main"')
def revision_is_a_branch(artifact: Artifact) -> None:
    """The revision is a branch."""
    artifact["manifest"]["revision"] = "main"


@mutant("ML701", "I19", says='"v0.3"')
def revision_is_a_tag(artifact: Artifact) -> None:
    """The revision is a tag, in a manifest of four keys."""
    _four_keys(artifact)
    artifact["manifest"]["revision"] = "v0.3"


@mutant("ML701", "I19", says=COMMIT[:7])
def revision_is_short(artifact: Artifact) -> None:
    """The revision is the beginning of a commit."""
    artifact["manifest"]["revision"] = COMMIT[:7]


@mutant("ML701", "I19", says="placeholder")
def revision_is_made_up(artifact: Artifact) -> None:
    """The revision has the form of a commit that nobody made."""
    artifact["manifest"]["revision"] = "0" * 40


@mutant("ML701", "I19", says="base_weights_sha256")
def nothing_pins_the_base(artifact: Artifact) -> None:
    """There is neither a revision nor a hash of the weights."""
    del artifact["manifest"]["base_weights_sha256"]


@mutant("ML701", says="$.files")
def listed_file_that_leads_out(artifact: Artifact) -> None:
    """A listed file is outside the folder."""
    artifact["manifest"]["files"]["../rows.jsonl"] = {"sha256": sha256_file(artifact["rows"][0]), "size": 1}


@mutant("ML701", says="$.template.file")
def template_that_leads_out(artifact: Artifact) -> None:
    """The recorded template is a file outside the folder."""
    file = artifact["folder"] / TEMPLATE
    outside = file.parent.parent / TEMPLATE
    outside.write_bytes(file.read_bytes())
    artifact["manifest"]["template"]["file"] = f"../{TEMPLATE}"


@mutant("ML704", says="no manifest.json")
def manifest_missing(artifact: Artifact) -> None:
    """There is no manifest, and the user asks for one."""
    (artifact["folder"] / MANIFEST).unlink()
    artifact["require_manifest"] = True


@mutant("ML704", says="manifest.json is one of another tool")
def manifest_of_another_tool(artifact: Artifact) -> None:
    """The manifest is that of a browser extension, and the user asks for the one of the run."""
    (artifact["folder"] / MANIFEST).write_text('{"manifest_version": 3, "name": "lora", "version": "1.0"}')
    artifact["require_manifest"] = True


@mutant("ML701", says="$.base: is missing")
def manifest_that_lost_most_of_its_keys(artifact: Artifact) -> None:
    """Of the manifest, two keys are left: it is still the run's own, and broken."""
    artifact["manifest"] = {"revision": COMMIT, "seed": 1}


@mutant("ML707", says="merged, and the folder holds an adapter")
def adapter_called_merged(artifact: Artifact) -> None:
    """The manifest of an adapter says that it is a merged model."""
    artifact["manifest"] |= {"kind": "merged", "parent": artifact["parent"]}


@mutant("ML702 ML703 ML707", says="adapter, and the folder holds a full model")
def merged_model_called_an_adapter(artifact: Artifact) -> None:
    """The manifest of a merged model says that it is an adapter."""
    artifact["merged_manifest"] = {**artifact["manifest"], "files": artifact["merged_manifest"]["files"]}
