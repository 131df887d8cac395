"""transformers removes spaces before punctuation when a BPE tokenizer decodes, if its configuration asks for it."""

from __future__ import annotations

import tempfile

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = "No , it is n't ."


def main() -> None:
    """Decode the ids of a text that has such spaces, by a vocabulary of single bytes."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    fast = Tokenizer(models.BPE({letter: number for number, letter in enumerate(sorted(letters))}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=True).save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder)
        found = loaded.decode(loaded(TEXT)["input_ids"])
    print(f"{'no longer true' if found == TEXT else 'still true'}: {TEXT!r} is decoded to {found!r}")


if __name__ == "__main__":
    main()
