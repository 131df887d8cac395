"""A manifest that was cut down is valid: a commit, or the manifest of a merged model, knows what it proved before."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from committed import commit_all, git
from manifests import FOUR_KEYS, SHA, adapter

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.records.files import listing, write_json
from pytest_mistral_lora.records.manifest import MANIFEST, build, sealed
from pytest_mistral_lora.records.notes import note_texts
from pytest_mistral_lora.records.verify import FieldCheck, verify

WEIGHTS = "adapter_model.safetensors"


def written(folder: Path, weights: bytes = b"weights", **parts: Any) -> dict[str, Any]:
    """Write the record of a run, and return its manifest."""
    folder.mkdir(exist_ok=True)
    data = {**adapter(), **parts}
    for name, text in note_texts(data).items():
        (folder / name).write_text(text)
    (folder / WEIGHTS).write_bytes(weights)
    (folder / MANIFEST).unlink(missing_ok=True)
    made = build(**{**data, "files": listing(folder)})
    write_json(folder / MANIFEST, made)
    return made


def proof(folder: Path, **options: Any) -> FieldCheck | None:
    return next((field for field in verify(folder, **options) if field.name.endswith("proof")), None)


def four_keys(data: dict[str, Any]) -> dict[str, Any]:
    return dict(FOUR_KEYS)


def without_a_note(data: dict[str, Any]) -> dict[str, Any]:
    files = {name: entry for name, entry in data["files"].items() if name != "DECISION.md"}
    return sealed({**data, "files": files})


def without_base_config(data: dict[str, Any]) -> dict[str, Any]:
    return sealed({key: value for key, value in data.items() if key != "base_config"})


CUTS: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], list[str]]] = [
    (four_keys, ["schema version 0 in place of 3", "no seal", "tokenizer, template, dataset, masking, lora, "]),
    (without_a_note, ["not listed: DECISION.md"]),
    (without_base_config, ["not recorded: base_config"]),
]


@pytest.mark.parametrize("committed", [False, True], ids=["not committed", "committed, too"])
@pytest.mark.parametrize(("cut", "found"), CUTS, ids=[cut.__name__ for cut, _ in CUTS])
def test_a_manifest_that_was_cut_down_is_named_with_the_commit_that_has_more(
    cut: Callable[[dict[str, Any]], dict[str, Any]],
    found: list[str],
    committed: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    data = written(folder, base_config={"hidden_size": 8})
    commit = commit_all(tmp_path)
    sound = proof(folder)
    assert sound is not None
    assert (sound.state, sound.recorded) == ("match", f"in commit {commit}")
    write_json(folder / MANIFEST, cut(data))
    if committed:
        commit_all(tmp_path)
    less = proof(folder)
    assert less is not None
    assert (less.state, less.recorded) == ("mismatch", f"in commit {commit}")
    assert all(one in str(less.found) for one in found)
    assert main(["verify", str(folder)]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if "less is proven" in line]
    assert line.startswith("mismatch       proof: less is proven ")
    assert line.endswith(f"; recorded in commit {commit}")
    assert main(["verify", str(folder), "--output-format", "github"]) == 1
    assert "title=ML712" in capsys.readouterr().out


def test_another_run_in_the_same_folder_may_record_other_facts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    data = written(folder, base_config={"hidden_size": 8})
    commit_all(tmp_path)
    del data["base_config"]
    write_json(folder / MANIFEST, sealed(data))
    less = proof(folder)
    assert less is not None
    assert str(less.found).endswith("not recorded: base_config")
    written(folder, b"other weights")
    again = proof(folder)
    assert again is not None
    assert again.state == "match"
    # but no run of ours has no seal
    write_json(folder / MANIFEST, four_keys(written(folder, b"other weights")))
    less = proof(folder)
    assert less is not None
    assert "version 0 in place of 3; " in str(less.found)
    assert str(less.found).endswith("no seal")


def test_without_a_commit_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    written(folder)
    assert proof(folder) is None
    (tmp_path / ".git").mkdir()
    broken = proof(folder)
    assert broken is not None
    assert broken.state == "not available"
    assert str(broken.found).startswith("git cannot tell: fatal: not a git repository")
    git(tmp_path, "init", "--quiet")
    (tmp_path / "other.md").write_text("x")
    commit_all(tmp_path, "other.md")
    untracked = proof(folder)
    assert untracked is not None
    assert (untracked.state, untracked.found) == ("not available", f"no commit has this {MANIFEST}")
    commit_all(tmp_path)
    # as within a hook of another repository
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    committed = proof(folder)
    assert committed is not None
    assert committed.state == "match"
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = proof(folder)
    assert missing is not None
    assert (missing.state, missing.found) == ("not available", "there is no git to ask")


def test_no_command_of_a_hostile_repository_runs(tmp_path: Path) -> None:
    folder, trap = tmp_path / "run", tmp_path / "trap.sh"
    data = written(folder)
    (folder / ".gitattributes").write_text("* filter=x diff=x\n")
    commit_all(tmp_path)
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/PWNED\nexit 1\n")
    trap.chmod(0o755)
    settings = {
        **{
            key: str(trap)
            for key in ("core.fsmonitor", "core.pager", "core.sshCommand", "core.editor", "pager.rev-list")
        },
        **{key: str(trap) for key in ("filter.x.clean", "filter.x.smudge", "diff.x.textconv", "diff.x.command")},
        "core.hooksPath": str(tmp_path),
        "protocol.ext.allow": "always",
        "remote.origin.promisor": "true",
        "remote.origin.url": f"ext::{trap}",
        "extensions.partialClone": "origin",
        "core.repositoryFormatVersion": "1",
    }
    for key, value in settings.items():
        git(tmp_path, "config", key, value)
    (tmp_path / "PWNED").unlink(missing_ok=True)
    write_json(folder / MANIFEST, four_keys(data))
    less = proof(folder)
    assert less is not None
    assert less.state == "mismatch"
    # an object that is missing is not fetched
    blob = git(tmp_path, "-c", "core.fsmonitor=false", "rev-parse", f"HEAD:run/{MANIFEST}")
    (tmp_path / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    unknown = proof(folder)
    assert unknown is not None
    assert unknown.state == "not available"
    assert not (tmp_path / "PWNED").exists()
    # the trap is one: Git itself, asked without our care, runs it
    subprocess.run(["git", "-C", folder, "cat-file", "blob", blob], capture_output=True, check=False, timeout=60)
    assert (tmp_path / "PWNED").exists()


def test_a_merged_model_knows_what_its_adapter_proved(tmp_path: Path) -> None:
    lora, merged = tmp_path / "lora", tmp_path / "merged"
    data = written(lora)
    copied = {key: value for key, value in data.items() if key not in ("kind", "seal", "files")}
    merged.mkdir()
    (merged / "model.safetensors").write_bytes(b"weights")
    parent = {"manifest_sha256": SHA, "tensors_sha256": SHA, "merge_dtype": "float32"}
    write_json(merged / MANIFEST, build(**copied, kind="merged", parent=parent, files=listing(merged)))
    assert proof(merged, parent=lora) is None
    write_json(lora / MANIFEST, dict(FOUR_KEYS))
    less = proof(merged, parent=lora)
    assert less is not None
    assert (less.name, less.state) == ("parent.proof", "mismatch")
    assert re.search("version 0; .*base_weights_sha256, tokenizer, ", str(less.found))
    assert less.recorded == "in the manifest of the merged model"
    assert json.loads((lora / MANIFEST).read_text()) == FOUR_KEYS
