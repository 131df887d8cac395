"""transformers warns about fix_mistral_regex for a tokenizer that has no such expression."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

WORDS = 100_001
"""Smaller vocabularies are not asked about."""


class Kept(logging.Handler):
    """Keeps each message."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.messages.append(record.getMessage())


def main() -> None:
    """Load a saved folder whose tokenizer splits at white space alone, and look for the warning."""
    kept = Kept()
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": "mistral"}), encoding="utf-8")
        logger = logging.getLogger("transformers")
        level = logger.level
        logger.addHandler(kept)
        logger.setLevel(logging.WARNING)
        AutoTokenizer.from_pretrained(folder)
        logger.setLevel(level)
        logger.removeHandler(kept)
    warned = [message for message in kept.messages if "fix_mistral_regex" in message]
    state = "still true" if warned else "no longer true"
    print(f"{state}: {len(warned)} warnings about fix_mistral_regex for a tokenizer that splits at white space")


if __name__ == "__main__":
    main()
