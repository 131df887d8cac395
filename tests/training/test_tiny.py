from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cut_sentencepiece import cut_v3

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base, require_trainable
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError, TokenizerError


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_same_seed_same_bytes_whatever_the_random_state(base: Path, tmp_path: Path) -> None:
    torch.rand(77)
    before = torch.get_rng_state()
    again = write_tiny_base(tmp_path / "again", cut_v3())
    assert torch.equal(torch.get_rng_state(), before)
    assert contents(again) == contents(base)
    other = write_tiny_base(tmp_path / "other", cut_v3(), seed=1)
    assert contents(other)["model.safetensors"] != contents(base)["model.safetensors"]


@pytest.mark.parametrize(
    "name", ["spm-v1", "spm-v3", "spm-v7m1", pytest.param("tekken-240911", marks=pytest.mark.slow)]
)
def test_the_checkpoint_has_the_tokenizers_own_vocabulary_and_ids(tmp_path: Path, name: str) -> None:
    folder = write_tiny_base(tmp_path / "tiny", shipped_tokenizer(name))
    oracle = CheckpointTokenizer(folder).oracle
    base = BaseFolder(folder)
    require_trainable(base)
    config = base.config
    assert oracle.sha256 == CheckpointTokenizer(shipped_tokenizer(name)).oracle.sha256
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (
        oracle.vocab_size,
        oracle.bos_id,
        oracle.eos_id,
    )
    assert config["pad_token_id"] not in (oracle.eos_id, oracle.bos_id)
    assert config["sliding_window"] is None
    model = load_base(BaseFolder(folder), "fp32", "cpu")
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_an_existing_folder_is_not_written_over(base: Path) -> None:
    before = contents(base)
    with pytest.raises(InputError, match="exists already"):
        write_tiny_base(base, shipped_tokenizer("spm-v1"))
    assert contents(base) == before


def test_a_file_that_is_no_tokenizer_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(TokenizerError):
        write_tiny_base(tmp_path / "tiny", tmp_path / "tekken.json")
    assert [file.name for file in tmp_path.iterdir()] == ["tekken.json"]
