"""What a folder declares beside its run: the sentences of its notes, its record, and claims on one name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from committed import commit_all
from manifests import adapter, merged

from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.compare_runs import compare_runs
from pytest_mistral_lora.records.deployment import conflicts, hashed_files
from pytest_mistral_lora.records.files import listing, write_json
from pytest_mistral_lora.records.manifest import build, load, violations
from pytest_mistral_lora.records.notes import (
    author_section,
    card_text,
    decision_text,
    declare_again,
    note_texts,
    with_author_section,
    write_notes,
)
from pytest_mistral_lora.records.verify import verify

A, B = "a" * 64, "b" * 64
SUPPORT = {"as": "adapter", "name": "support"}
MERGED_SUPPORT = {"as": "merged", "name": "support"}
SERVER = {"kind": "auto", "url": "https://models.example.org"}


def finished(folder: Path, parts: dict[str, Any]) -> Path:
    """Write the notes and the manifest of a run into a folder."""
    folder.mkdir(exist_ok=True)
    for name, text in note_texts(parts).items():
        (folder / name).write_text(text)
    write_json(folder / "manifest.json", build(**{**parts, "files": listing(folder)}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return finished(tmp_path / "lora-out", adapter())


@pytest.mark.parametrize(
    ("kind", "deployment", "sentence"),
    [
        ("adapter", SUPPORT, "Production serves this adapter as `support`."),
        ("adapter", MERGED_SUPPORT, "Production serves a merged model of this adapter as `support`; this folder is"),
        ("adapter", None, "Production does not serve this adapter."),
        ("merged", MERGED_SUPPORT, "This folder is the served artifact `support`."),
        ("merged", SUPPORT, "This folder is a by-product: production serves the adapter `support`."),
        ("merged", None, "Production does not serve this model, nor its adapter."),
    ],
)
def test_both_notes_say_what_production_serves(kind: str, deployment: Any, sentence: str) -> None:
    parts = {"adapter": adapter(), "merged": {**adapter(), **merged()}}[kind] | {"deployment": deployment}
    assert violations(parts) == []
    for text in (decision_text(parts), card_text(parts)):
        assert sentence in text
        assert "undeclared" not in text


def test_an_undeclared_deployment_is_a_sentence_of_the_decision_with_the_key_to_write() -> None:
    text = decision_text(adapter())
    assert "Its deployment is undeclared" in text
    assert "`deployment: {as: adapter, name: support}`" in text
    assert "undeclared" not in card_text(adapter())


def test_the_server_is_named_in_the_decision_and_not_in_the_published_card() -> None:
    parts = adapter() | {"deployment": {**SUPPORT, "server": SERVER}}
    assert "`https://models.example.org`" in decision_text(parts)
    assert "example.org" not in card_text(parts)


@pytest.mark.parametrize(
    ("deployment", "place"),
    [
        ({"name": "support"}, "$.deployment.as"),
        ({**SUPPORT, "as": "both"}, "$.deployment.as"),
        ({**SUPPORT, "nam": 1}, "$.deployment.nam"),
        ({**SUPPORT, "server": {**SERVER, "key_env": "AWS_SECRET_ACCESS_KEY"}}, "$.deployment.server.key_env"),
    ],
)
def test_a_deployment_that_no_recipe_can_declare_is_a_violation(deployment: dict[str, Any], place: str) -> None:
    assert [str(one.place) for one in violations(adapter() | {"deployment": deployment})] == [place]


def test_a_declaration_changes_nothing_of_the_record_of_the_run(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    identity = AdapterFolder(folder).manifest_sha256
    assert identity == sha256_file(folder / "manifest.json")
    for declared in ({"deployment": SUPPORT}, {"deployment": MERGED_SUPPORT}, {"deployment": None}):
        written = declare_again(folder, {**declared, "evaluation": []})
        assert [file.name for file in written] == ["DECISION.md", "README.md", "manifest.json"]
        assert load(folder).data["deployment"] == declared["deployment"]
        assert AdapterFolder(folder).manifest_sha256 == identity
        assert {fact.state for fact in verify(folder) if fact.name == "seal"} == {"match"}
        assert declare_again(folder, {**declared, "evaluation": []}) == []
        # the notes can be made again
        write_notes(folder)
    declare_again(folder, {"evaluation": []})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_any_other_change_of_a_declared_manifest_changes_its_identity(folder: Path) -> None:
    declare_again(folder, {"deployment": SUPPORT, "evaluation": []})
    identity, file = AdapterFolder(folder).manifest_sha256, folder / "manifest.json"
    text = file.read_text()
    for changed in (text.replace('"learning_rate": 0.0002', '"learning_rate": 0.0003'), text + "\n"):
        assert changed != text
        file.write_text(changed)
        assert AdapterFolder(folder).manifest_sha256 != identity


def test_the_part_of_the_author_stays(folder: Path) -> None:
    note = folder / "DECISION.md"
    note.write_text(with_author_section(note.read_text(), "Because of the law."))
    declare_again(folder, {"deployment": SUPPORT, "evaluation": []})
    assert author_section(note.read_text()) == "Because of the law."
    assert {fact.state for fact in verify(folder) if fact.name.startswith("files.DECISION")} == {"match"}


def test_a_changed_manifest_is_not_sealed_again(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"learning_rate": 0.0002', '"learning_rate": 0.0003'))
    before = file.read_bytes()
    with pytest.raises(InputError, match="was changed since it was sealed"):
        declare_again(folder, {"deployment": SUPPORT, "evaluation": []})
    assert file.read_bytes() == before


def test_a_later_version_may_declare_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_mistral_lora.records import notes

    identity = AdapterFolder(folder).manifest_sha256
    monkeypatch.setattr(notes, "__version__", "9.9")
    monkeypatch.setattr(notes, "UNDECLARED", "Another sentence.")
    declare_again(folder, {"deployment": SUPPORT, "evaluation": []})
    data = load(folder).data
    assert data["notes"]["version"] == notes.noted_by(data) == "9.9"
    # its text of a note without a declaration is another one, too
    declare_again(folder, {"evaluation": []})
    assert "Another sentence." in (folder / "DECISION.md").read_text()
    assert AdapterFolder(folder).manifest_sha256 == identity


def test_a_withdrawn_deployment_is_no_lost_proof(folder: Path) -> None:
    declare_again(folder, {"deployment": SUPPORT, "evaluation": []})
    commit_all(folder)
    for declared in ({"deployment": None}, {}):
        declare_again(folder, {**declared, "evaluation": []})
        assert [fact.state for fact in verify(folder) if fact.name == "proof"] == ["match"]


def test_a_difference_of_two_runs_shows_the_deployment_and_not_its_hashes(folder: Path, tmp_path: Path) -> None:
    other = finished(tmp_path / "other", adapter())
    declare_again(other, {"deployment": SUPPORT, "evaluation": []})
    files = (folder / "manifest.json", other / "manifest.json")
    paths = {fact.path for fact in compare_runs(*files).facts if fact.group != "files"}
    assert paths == {"$.deployment"}


def of_adapter(tensors: str, deployment: Any) -> dict[str, Any]:
    parts = adapter()
    return {**parts, "lora": {**parts["lora"], "tensors_sha256": tensors}, "deployment": deployment}


def of_merged(tensors: str, deployment: Any, weights: str = A) -> dict[str, Any]:
    parts = merged()
    files = {"model.safetensors": {"sha256": weights, "size": 10}}
    parent = {**parts["parent"], "tensors_sha256": tensors}
    return {**parts, "parent": parent, "deployment": deployment, "files": files}


ELSEWHERE = {**SUPPORT, "server": {**SERVER, "url": "https://staging.example.org"}}
CLAIMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "two adapters": (of_adapter(A, SUPPORT), of_adapter(B, SUPPORT), "they are of different adapters"),
    "two paths": (of_adapter(A, SUPPORT), of_merged(A, MERGED_SUPPORT), "one says that it is an adapter, the other"),
    "a stranger's merge": (of_adapter(A, MERGED_SUPPORT), of_merged(B, MERGED_SUPPORT), "different adapters"),
    "two merged models": (
        of_merged(A, MERGED_SUPPORT),
        of_merged(A, MERGED_SUPPORT, weights=B),
        "they are different merged models of one adapter",
    ),
    "an adapter and its by-product": (of_adapter(A, SUPPORT), of_merged(A, SUPPORT), ""),
    "a source and its merged model": (of_adapter(A, MERGED_SUPPORT), of_merged(A, MERGED_SUPPORT), ""),
    "a copy": (of_adapter(A, SUPPORT), of_adapter(A, SUPPORT), ""),
    "another name": (of_adapter(A, SUPPORT), of_adapter(B, {**SUPPORT, "name": "sales"}), ""),
    "another server": (of_adapter(A, SUPPORT), of_adapter(B, ELSEWHERE), ""),
    "one server, spelled in two ways": (
        of_adapter(A, ELSEWHERE),
        of_adapter(B, {**SUPPORT, "server": {**SERVER, "url": "https://staging.example.org/v1/"}}),
        "different adapters",
    ),
    "withdrawn": (of_adapter(A, None), of_adapter(B, SUPPORT), ""),
    "undeclared": (adapter(), of_adapter(B, SUPPORT), ""),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_two_folders_claim_a_name_only_if_production_cannot_serve_both(name: str) -> None:
    first, second, why = CLAIMS[name]
    found = [*conflicts({Path("a"): first, Path("b"): second})]
    if why:
        [(earlier, later, reason)] = found
        assert (earlier, later) == (Path("a"), Path("b"))
        assert why in reason
    else:
        assert found == []


def test_only_files_of_the_folder_are_hashed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "results").mkdir(parents=True)
    (home / "results" / "a.json").write_text("{}")
    (tmp_path / "secret").write_text("x")
    (home / "link").symlink_to(tmp_path / "secret")
    found = hashed_files(home, ["results/a.json", "results", "missing", "link", "../secret"])
    entry = found.pop("results/a.json")
    assert entry == {"sha256": sha256_file(home / "results" / "a.json"), "size": 2}
    assert found == dict.fromkeys(("results", "missing", "link", "../secret"))


def test_the_commands_of_the_user_are_listed_and_their_files_are_compared(folder: Path) -> None:
    home, name = folder.parent, "results/a.json"
    (home / "results").mkdir()
    command = {"command": "judge --out `date` | tee a", "results": {}, "files": {name: None}}

    def state() -> str:
        [fact] = [fact for fact in verify(folder) if fact.name.startswith("evaluation.")]
        assert fact.name == f"evaluation.yours[0].files.{name}"
        return fact.state

    declare_again(folder, {"evaluation": [command]})
    note = (folder / "DECISION.md").read_text()
    assert "Yours: ``judge --out `date` | tee a``" in note
    assert f"| `{name}` | not there" in note
    assert state() == "not available"
    (home / name).write_text("1")
    declare_again(folder, {"evaluation": [{**command, "files": hashed_files(home, [name])}]})
    assert sha256_file(home / name) in (folder / "DECISION.md").read_text()
    assert state() == "match"
    (home / name).write_text("2")
    assert state() == "mismatch"
    (home / name).unlink()
    assert state() == "not available"
    # measured results stay beside them
    assert [entry["command"] for entry in load(folder).data["evaluation"]] == ["train", command["command"]]
    assert json.loads((folder / "manifest.json").read_text())["evaluation"][0]["results"] == {"loss": 0.5}
