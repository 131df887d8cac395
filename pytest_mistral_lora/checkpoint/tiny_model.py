"""The tiny model: a real `MistralForCausalLM` checkpoint, small enough to learn by heart on one CPU thread."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.tokenizers import TEKKEN
from pytest_mistral_lora.errors import InputError

if TYPE_CHECKING:
    from transformers import MistralConfig

HIDDEN_SIZE = 128
LAYERS = 2
INITIALIZER_RANGE = 0.2
"""Ten times the usual scale: with 0.02, LoRA cannot steer a frozen random head, and nothing is learned."""


def write_tiny_base(folder: Path, tokenizer_file: Path, *, seed: int = 0) -> Path:
    """Write a seeded tiny checkpoint: `config.json`, `model.safetensors` (float32) and the tokenizer file.

    The vocabulary is the tokenizer's own. The same seed and libraries give the same bytes; the caller's random state
    is left as it was.

    Args:
        folder: The checkpoint folder to make.
        tokenizer_file: A `tekken.json` or a `*.model.vN`.
        seed: Seed of the weights.

    Returns:
        `folder`.

    Raises:
        InputError: If `folder` exists.
        TokenizerError: If the tokenizer file cannot be loaded.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import MistralForCausalLM

    if folder.exists():
        raise InputError("exists already", place=str(folder), next_step="Name a folder that is not there yet.")
    oracle = Oracle(tokenizer_file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # built beside its place and renamed: another process never sees half a checkpoint under the name
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as parent:
        building = Path(parent) / folder.name
        config = tiny_config(oracle)
        config.save_pretrained(building)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MistralForCausalLM(config).float()
        save_file(model.state_dict(), building / "model.safetensors", metadata={"format": "pt"})
        # the names by which transformers and mistral-common find the file and its version
        suffixes = "".join(oracle.path.suffixes[-2:])
        shutil.copy(tokenizer_file, building / (TEKKEN if oracle.kind == "tekken" else f"tokenizer{suffixes}"))
        building.rename(folder)
    return folder


def tiny_config(oracle: Oracle) -> MistralConfig:
    """Return the configuration of the tiny model for a tokenizer's vocabulary."""
    from transformers import MistralConfig

    # never EOS: a loss that leaves out padding would leave out the end of each turn, too
    unknown = (token for token in range(oracle.vocab_size) if oracle.piece(token) == "<unk>")
    pads = [token for token, literal in oracle.control_tokens.items() if literal == "<pad>"]
    return MistralConfig(
        vocab_size=oracle.vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HIDDEN_SIZE // 4,
        max_position_embeddings=4096,
        sliding_window=None,
        tie_word_embeddings=False,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=oracle.bos_id,
        eos_token_id=oracle.eos_id,
        pad_token_id=pads[0] if pads else next(unknown),
        architectures=["MistralForCausalLM"],
    )
