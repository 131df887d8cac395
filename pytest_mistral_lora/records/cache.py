"""The folder for what takes long to make and can be made anew at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$MISTRAL_LORA_CACHE`, or else `mistral-lora` in the folder of the Hugging Face libraries.

    That folder is `$HF_HOME`, by default `~/.cache/huggingface`.
    """
    named = os.environ.get("MISTRAL_LORA_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "mistral-lora"
