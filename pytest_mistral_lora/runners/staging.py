"""The folder that a runner is given as its model: a checkpoint's tokenizer as it is, and a tiny model beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from pytest_mistral_lora.checkpoint.tokenizer_files import MODEL_CONFIG, TokenizerFiles
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import RunnerError

_HIDDEN_SIZE = 8


def stage_checkpoint(tokenizer: CheckpointTokenizer, folder: Path) -> None:
    """Write a checkpoint that a runner can load, into an empty folder.

    A checkpoint folder's tokenizer files are copied, so that the runner reads what it would read. A bare tokenizer
    file, which no runner loads, is converted as for the Hub: `tokenizer.json`, and the chat template that
    mistral-common generates.

    Args:
        tokenizer: The tokenizer.
        folder: Where to write.

    Raises:
        TokenizerError: If the tokenizer cannot be loaded.
        RunnerError: If the folder has no tokenizer that a runner could load.
    """
    tokenizer.files.refuse_hazards()
    if tokenizer.path.is_file():
        tokenizer.fast.save_pretrained(folder)
    else:
        _copy_tokenizer(tokenizer.files, folder)
    _write_model(tokenizer, folder)


def _copy_tokenizer(files: TokenizerFiles, folder: Path) -> None:
    names = [name for name in files.names if name != MODEL_CONFIG]
    if not names:
        raise RunnerError("no tokenizer file", place=str(files.path), expected="a checkpoint folder with its tokenizer")
    for name in names:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(files.file(name), target)


def _write_model(tokenizer: CheckpointTokenizer, folder: Path) -> None:
    """Write a model that knows every id: no runner trains it, but each wants to load one."""
    import torch
    from safetensors.torch import save_file
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=max(tokenizer.oracle.vocab_size, 16),
        hidden_size=_HIDDEN_SIZE,
        intermediate_size=_HIDDEN_SIZE,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=_HIDDEN_SIZE,
        tie_word_embeddings=False,
        architectures=["MistralForCausalLM"],
        bos_token_id=tokenizer.oracle.bos_id,
        eos_token_id=tokenizer.oracle.eos_id,
    )
    config.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        save_file(MistralForCausalLM(config).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
