from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub, Repository, serve
from pinned_hub import REPO, TOKENIZER, Place
from small_mistral import write_small_mistral

from pytest_mistral_lora.chat.oracle import shipped_tokenizer


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    sizes = {"vocab_size": 32768, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    folder = write_small_mistral(tmp_path_factory.mktemp("tiny"), **sizes, **heads)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return files | {TOKENIZER: shipped_tokenizer("spm-v3").read_bytes()}


@pytest.fixture
def place(tmp_path: Path, model_files: dict[str, bytes]) -> Iterator[Place]:
    repository = Repository()
    old = repository.commit(
        {
            **model_files,
            "consolidated.safetensors": model_files["model.safetensors"],
            "modeling_mistral.py": b"raise SystemExit('this code ran')\n",
            "pytorch_model.bin": pickle.dumps({"weight": 1}),
            "checkpoint-1/model.safetensors": b"another model",
        }
    )
    new = repository.commit({**model_files, TOKENIZER: shipped_tokenizer("spm-v2").read_bytes()})
    hub = Hub({REPO: repository})
    with serve(hub):
        yield Place(hub, tmp_path, repository, old, new)
