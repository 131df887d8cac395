"""AutoTokenizer takes mistral-common's backend if tekken.json is in a folder, whatever tokenizer.json is beside it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import mistral_common
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FILE = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"


def main() -> None:
    """Load a folder that has both a tokenizer.json of ChatML and tekken.json, and name the class."""
    with tempfile.TemporaryDirectory() as folder:
        words = Tokenizer(models.WordLevel({"<unk>": 0, "<|im_start|>": 1}, unk_token="<unk>"))
        fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
        fast.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
        fast.save_pretrained(folder)
        (Path(folder) / "tekken.json").write_bytes(FILE.read_bytes())
        # else the folder has no model type, by which AutoTokenizer may choose
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": "mistral"}), encoding="utf-8")
        name = type(AutoTokenizer.from_pretrained(folder)).__name__
    print(f"{'still true' if name == 'MistralCommonBackend' else 'no longer true'}: it is {name}")


if __name__ == "__main__":
    main()
