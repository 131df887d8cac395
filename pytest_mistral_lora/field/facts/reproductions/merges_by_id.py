"""transformers converts a SentencePiece file with its merges in the order of ids: runs of spaces get other ids."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import mistral_common
import transformers
from sentencepiece import SentencePieceProcessor

FILE = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
TEXT = "x  y   End.  Next"


def main() -> None:
    """Compare the ids of a converted file with those of the file itself."""
    expected = SentencePieceProcessor(model_file=str(FILE)).encode(TEXT)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(FILE, Path(folder) / "tokenizer.model")
        # transformers 4 has the older name
        loader = getattr(transformers, "TokenizersBackend", transformers.LlamaTokenizerFast)
        found = loader.from_pretrained(folder, legacy=False)(TEXT, add_special_tokens=False)["input_ids"]
    state = "no longer true" if found == expected else "still true"
    print(f"{state}: {found} for {TEXT!r}; the file itself {expected}")


if __name__ == "__main__":
    main()
