from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from manifests import FOUR_KEYS, adapter, merged

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import listing, unfinished_path, write_json
from pytest_mistral_lora.records.manifest import build
from pytest_mistral_lora.records.notes import (
    NOTES,
    author_section,
    card_text,
    note_bytes,
    note_texts,
    with_author_section,
    write_notes,
)


def front_matter(text: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parts = adapter()
    for name, text in note_texts(parts).items():
        (tmp_path / name).write_text(text)
    write_json(tmp_path / "manifest.json", build(**{**parts, "files": listing(tmp_path)}))
    return tmp_path


def test_the_card_of_an_adapter_has_the_metadata_of_the_hub() -> None:
    assert front_matter(card_text(adapter())) == {
        "base_model": "mistralai/Mistral-7B-v0.3",
        "base_model_relation": "adapter",
        "datasets": ["train.jsonl"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "mistral"],
    }


def test_the_card_of_a_merged_model_does_not_call_it_an_adapter() -> None:
    found = front_matter(card_text(merged()))
    assert (found["base_model_relation"], found["library_name"]) == ("finetune", "transformers")
    assert "# LoRA adapter of" not in card_text(merged())


def test_a_recipe_adds_to_the_metadata_and_may_replace_it() -> None:
    manifest = adapter()
    manifest["recipe"]["card"] = {"license": "apache-2.0", "datasets": ["owner/chats"]}
    found = front_matter(card_text(manifest))
    assert (found["license"], found["datasets"]) == ("apache-2.0", ["owner/chats"])


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("../bases/tiny", "tiny"),
        ("/abs/tiny", "tiny"),
        ("a/b", "a/b"),
        ("..", "local"),
        ("models/base modèle", "base-mod-le"),
        ("é", "local"),
    ],
)
def test_a_local_base_is_named_as_the_hub_takes_names(base: str, shown: str) -> None:
    assert front_matter(card_text({**adapter(), "base": base, "revision": None}))["base_model"] == shown


def test_a_manifest_that_records_too_little_has_no_notes() -> None:
    assert note_texts({"kind": "adapter", **FOUR_KEYS}) == {}


@pytest.mark.parametrize("name", NOTES)
def test_what_the_author_writes_is_kept_and_changes_no_hash(folder: Path, name: str) -> None:
    before, counted = (folder / name).read_text(), note_bytes(folder, name)
    written = with_author_section(before, "We tried r 64 first.\n\n- It was no better.")
    (folder / name).write_text(written)
    assert note_bytes(folder, name) == counted
    damaged = written.replace("Mistral-7B", "Mistral-8B")
    (folder / name).write_text(damaged)
    assert note_bytes(folder, name) != counted
    write_notes(folder)
    assert (folder / name).read_text() == written


@pytest.mark.parametrize("name", NOTES)
def test_a_note_that_was_lost_is_made_again(folder: Path, name: str) -> None:
    text = (folder / name).read_bytes()
    (folder / name).unlink()
    assert [path.name for path in write_notes(folder)] == list(NOTES)
    assert (folder / name).read_bytes() == text


def test_the_remains_of_a_killed_note_go(folder: Path) -> None:
    """Else `verify` would report a file that is not listed from then on."""
    left = unfinished_path(folder / "DECISION.md")
    left.touch()
    os.utime(left, (0, 0))
    write_notes(folder)
    assert not left.exists()
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    with pytest.raises(InputError, match=r"README\.md: is a directory"):
        write_notes(folder)


def test_another_text_than_is_listed_is_not_written(folder: Path) -> None:
    parts = adapter()
    files = listing(folder)
    files["DECISION.md"]["sha256"] = "0" * 64
    parts["environment"]["packages"]["pytest-mistral-lora"] = "0.0.1"
    write_json(folder / "manifest.json", build(**{**parts, "files": files}))
    before = (folder / "README.md").read_bytes()
    with pytest.raises(InputError, match=r"(?s)DECISION.md.*another text.*0\.0\.1"):
        write_notes(folder)
    assert (folder / "README.md").read_bytes() == before


@given(st.text())
def test_any_text_is_kept_as_the_authors(own: str) -> None:
    text = card_text(adapter())
    written = with_author_section(text, own.strip())
    assert author_section(written) == own.strip()
    assert with_author_section(written, "") == text


def test_a_text_without_marks_has_no_part_of_its_author() -> None:
    assert author_section("no marks") == ""
    assert with_author_section("no marks", "mine") == "no marks"
