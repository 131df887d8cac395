from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_sentencepiece import cut_v3
from fp8_bases import BLOCK, fp8_copy
from many_rows import ROWS, numbered, write_lines
from tiny_runs import CONVERSATIONS, MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.chat.reading import chunks
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS
from pytest_mistral_lora.training.merge import MergedModel, merge
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.run import RunResult, train

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("checkpoint") / "tiny", cut_v3())


@pytest.fixture(scope="session")
def full_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer that transformers loads, as those on the Hub have."""
    folder = write_tiny_base(tmp_path_factory.mktemp("full") / "tiny", cut_v3())
    CheckpointTokenizer(folder).fast.save_pretrained(folder)
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path, base: Path) -> MakeRecipe:
    write_rows(tmp_path / "rows.jsonl")

    def make(base: Path = base, **sections: dict[str, Any]) -> Recipe:
        return parse_recipe(recipe_data(base, **sections), folder=tmp_path)

    return make


@pytest.fixture(scope="session")
def full_weights_sha256(full_base: Path) -> str:
    return BaseFolder(full_base).weights_sha256


@pytest.fixture
def make_full(tmp_path: Path, full_base: Path, full_weights_sha256: str) -> MakeRecipe:
    write_rows(tmp_path / "rows.jsonl")
    write_rows(tmp_path / "held_out.jsonl", CONVERSATIONS[:1])

    def make(**sections: dict[str, Any]) -> Recipe:
        return parse_recipe(recipe_data(full_base, weights_sha256=full_weights_sha256, **sections), folder=tmp_path)

    return make


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunResult:
    folder = tmp_path_factory.mktemp("run")
    write_rows(folder / "rows.jsonl")
    torch.rand(1000)
    evaluation = {"generations": 5, "max_new_tokens": 40}
    return train(parse_recipe(recipe_data(base, evaluation=evaluation), folder=folder))


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


@pytest.fixture
def rows_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows that are so many that they are kept."""
    monkeypatch.setattr(chunks, "MANY_BYTES", 1)
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "rows.jsonl", numbered(ROWS))
    return tmp_path


@pytest.fixture(scope="session")
def fp8_bases(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[int | None, Path]:
    """The tiny base in FP8: with one scale a matrix (None), and with blocks."""
    folder = tmp_path_factory.mktemp("fp8")
    return {block: fp8_copy(base, folder / f"blocks-{block}", block=block) for block in (None, BLOCK)}


@pytest.fixture
def adapter(run: RunResult, tmp_path: Path) -> Path:
    """A copy of the run's folder, to be changed."""
    return Path(shutil.copytree(run.output, tmp_path / "copy"))


@pytest.fixture
def one(run: RunResult) -> Path:
    """One transcript of the run: a proof with one prompt."""
    return run.output / TRANSCRIPTS / "row-0004.json"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """The rows of the run."""
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture(scope="session")
def merged(run: RunResult, tmp_path_factory: pytest.TempPathFactory) -> MergedModel:
    return merge(run.output, tmp_path_factory.mktemp("merged") / "out", run.base_folder)
