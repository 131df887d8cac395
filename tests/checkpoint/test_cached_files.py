"""Files of the Hub's cache that are not those of the pinned commit are refused, on disk and on the way."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hub import git_sha1, sha256
from pinned_hub import REPO, TOKENIZER, Place

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.hub_cache import check_file, kept_listing
from pytest_mistral_lora.errors import PinError

COMMIT = hashlib.sha1(b"some commit").hexdigest()


def relink(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


@pytest.mark.parametrize("offline", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_cached_file_that_was_edited_is_refused(place: Place, offline: bool) -> None:
    file = place.fetch(place.old) / "config.json"
    blob = file.resolve()
    data = bytearray(blob.read_bytes())
    data[0] ^= 1
    blob.write_bytes(bytes(data))
    answer = place.resolve(place.old, offline=offline)
    assert answer["place"] == str(file)
    assert git_sha1(bytes(data)) in answer["found"]


@pytest.mark.parametrize("offline", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_tokenizer_of_another_commit_is_refused(place: Place, offline: bool) -> None:
    place.fetch(place.new)
    file = place.fetch(place.old) / TOKENIZER
    relink(file, Path(os.path.relpath((place.snapshot(place.new) / TOKENIZER).resolve(), file.parent)))
    keeps_listings = (place.cache / "trees").is_dir()
    answer = place.resolve(place.old, offline=offline)
    if offline and not keeps_listings:
        # huggingface_hub before version 2 notes nowhere which blob a commit's file is
        assert answer == {"folder": str(place.snapshot(place.old))}
    else:
        assert answer["place"] == str(file)
        assert sha256(shipped_tokenizer("spm-v2").read_bytes()) in answer["found"]


def test_the_endpoint_is_believed_before_the_notes_in_the_cache(place: Place, model_files: dict[str, bytes]) -> None:
    place.fetch(place.new)
    file = place.fetch(place.old) / TOKENIZER
    other = (place.snapshot(place.new) / TOKENIZER).resolve()
    relink(file, other)
    for notes in (place.cache / "trees").glob(f"{place.old}.json"):
        notes.write_text(notes.read_text().replace(sha256(model_files[TOKENIZER]), other.name))
    assert place.resolve(place.old)["place"] == str(file)


def test_a_commit_that_the_repository_does_not_have_is_not_served_from_the_cache(place: Place) -> None:
    place.fetch(place.old)
    del place.repository.commits[place.old]
    assert place.resolve(place.old)["found"] == f"{REPO} has no commit {place.old}"


def test_a_file_that_leads_out_of_the_cache_is_refused(place: Place, model_files: dict[str, bytes]) -> None:
    file = place.fetch(place.old) / TOKENIZER
    outside = place.home / sha256(model_files[TOKENIZER])
    outside.write_bytes(model_files[TOKENIZER])
    relink(file, outside)
    answer = place.resolve(place.old, offline=True)
    assert answer["place"] == str(file)
    assert "leads out of the cache" in answer["found"]


def test_a_file_that_the_commit_does_not_have_is_refused(place: Place) -> None:
    folder = place.fetch(place.old)
    (folder / "tokenizer.json").write_text("{}")
    answer = place.resolve(place.old)
    assert answer["place"] == str(folder / "tokenizer.json")
    assert "has no such file" in answer["found"]


def test_weights_are_hashed_only_when_asked(place: Place) -> None:
    file = place.fetch(place.old, weights=True) / "model.safetensors"
    blob = file.resolve()
    blob.write_bytes(bytes(reversed(blob.read_bytes())))
    place.fetch(place.old, weights=True, offline=True)
    assert place.resolve(place.old, weights=True, offline=True, verify=True)["place"] == str(file)


def test_a_file_damaged_on_the_way_is_refused(place: Place) -> None:
    place.hub.corrupted.add("config.json")
    assert place.resolve(place.old)["place"] == str(place.snapshot(place.old) / "config.json")


def test_a_loop_of_links_leads_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(PinError, match="or nowhere"):
        check_file(folder / "config.json", folder, None, content=True)


@pytest.mark.parametrize("entry", [{"blob_id": 5}, {"blob_id": None}, {"lfs_sha256": ["a"], "blob_id": "b"}, {}, 3])
def test_a_note_of_any_types_is_no_listing(entry: object, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / COMMIT
    (tmp_path / "trees").mkdir()
    note = tmp_path / "trees" / f"{COMMIT}.json"
    note.write_text(json.dumps({"format_version": 1, "files": {"config.json": entry}}))
    assert kept_listing(folder) is None
    note.write_text(json.dumps({"format_version": 1, "files": {"config.json": {"blob_id": COMMIT}}}))
    assert kept_listing(folder) == {"config.json": COMMIT}


def test_a_cache_without_links_is_judged_by_the_listing(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    file = folder / "config.json"
    file.write_text("{}")
    check_file(file, folder, {"config.json": git_sha1(b"{}")}, content=True)
    with pytest.raises(PinError, match="not the file of commit"):
        check_file(file, folder, {"config.json": git_sha1(b"{ }")}, content=True)
