"""transformers converts a folder of the class LlamaTokenizer with its merges in the order of ids."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import mistral_common
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

FILE = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
TEXT = "x  y   End.  Next"
CONFIG = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}


def main() -> None:
    """Compare the ids of the loaded folder with those of the file in it."""
    expected = SentencePieceProcessor(model_file=str(FILE)).encode(TEXT)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(FILE, Path(folder) / "tokenizer.model")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        found = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
    state = "no longer true" if found == expected else "still true"
    print(f"{state}: {found} for {TEXT!r}; the file itself {expected}")


if __name__ == "__main__":
    main()
