"""The base of `mistral-lora init --demo`: a tiny model with a real tokenizer, for a tour without a network."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

BASE = Path("models/demo")
"""The folder of the base in the repository."""
TOKENIZER = "spm-v3"
"""The shipped tokenizer of the base: the smallest vocabulary with the layout of recent models."""
TRAINING = {"epochs": "40", "learning_rate": "1e-2"}
"""The settings of the recipe with which the tiny model learns the example rows by heart, in seconds."""


def write_demo_base(folder: Path) -> Path:
    """Write the base of the demo, unless it is there; return its folder.

    It has what a repository of Mistral at the Hub has: a configuration, weights, Mistral's tokenizer file, and the
    tokenizer and chat template of transformers.

    Args:
        folder: The repository.
    """
    base = folder / BASE
    if base.exists():
        return base
    base.parent.mkdir(parents=True, exist_ok=True)
    source = shipped_tokenizer(TOKENIZER)
    # built beside its place: an interrupted command leaves no half of a base
    with tempfile.TemporaryDirectory(dir=base.parent, prefix=f".{base.name}.") as parent:
        building = write_tiny_base(Path(parent) / base.name, source)
        saved = Path(parent) / "tokenizer"
        CheckpointTokenizer(source).fast.save_pretrained(saved)
        for file in saved.iterdir():
            shutil.copyfile(file, building / file.name)
        building.rename(base)
    return base
