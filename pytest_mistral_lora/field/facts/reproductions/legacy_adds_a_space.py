"""AutoTokenizer loads a folder with tokenizer.model alone as legacy=True: a space behind each control token."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import mistral_common
from transformers import AutoTokenizer

FILE = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"


def main() -> None:
    """Compare the ids of a marker and a word by default with those of legacy=False."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(FILE, Path(folder) / "tokenizer.model")
        given = {"text": "[INST] Hi", "add_special_tokens": False}
        found = AutoTokenizer.from_pretrained(folder)(**given)["input_ids"]
        wanted = AutoTokenizer.from_pretrained(folder, legacy=False)(**given)["input_ids"]
    state = "no longer true" if found == wanted else "still true"
    print(f"{state}: {found} for {given['text']!r} by default, {wanted} with legacy=False")


if __name__ == "__main__":
    main()
