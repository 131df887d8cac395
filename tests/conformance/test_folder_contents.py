"""Which files of a folder are named because no rule reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_mistral_lora.conformance.folder_contents import other_files

READ = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "tekken.json",
    "tokenizer.model.v3",
    "trainer_state.json",
)
HARMLESS = (
    ".gitattributes",
    "LICENSE",
    "README.md",
    "all_results.json",
    "optimizer.pt",
    "rng_state_0.pth",
    "training_args.bin",
)


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_files_that_are_read_or_harmless_stay_quiet(tmp_path: Path) -> None:
    made(tmp_path, *READ, *HARMLESS)
    for name in (".cache", "checkpoint-500", "runs"):
        (tmp_path / name).mkdir()
    assert other_files(tmp_path).not_checked == ""


@pytest.mark.parametrize("name", ["vocab.json", "modeling_mistral.py", "pytorch_model.bin", "other_params.json"])
def test_another_file_is_named(name: str, tmp_path: Path) -> None:
    assert other_files(made(tmp_path, *READ, name)).not_checked == f"no rule reads {name}"


def test_a_folder_is_named_with_a_slash(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    assert other_files(tmp_path).not_checked == "no rule reads 1_Pooling/"


def test_many_files_are_counted(tmp_path: Path) -> None:
    made(tmp_path, *(f"part{number}.dat" for number in range(9)))
    shown = ", ".join(f"part{number}.dat" for number in range(8))
    assert other_files(tmp_path).not_checked == f"no rule reads {shown} and 1 more"


def test_a_file_of_the_manifest_is_checked_by_its_hash(tmp_path: Path) -> None:
    made(tmp_path, "rendered_row.json", "other.json")
    (tmp_path / "data").mkdir()
    manifest = {"files": {"rendered_row.json": {}, "data/rows.jsonl": {}}}
    assert other_files(tmp_path, manifest).not_checked == "no rule reads other.json"
