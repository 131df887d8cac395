"""mistral-common's encode_fim cuts the suffix of a Tekken tokenizer as if it was one of SentencePiece."""

from __future__ import annotations

from pathlib import Path

import mistral_common
from mistral_common.protocol.fim.request import FIMRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

FILE = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
SUFFIX = "/p"


def main() -> None:
    """Look for the ids of the suffix in the encoded request."""
    tokenizer = MistralTokenizer.from_file(FILE)
    found = tokenizer.encode_fim(FIMRequest(prompt="a", suffix=SUFFIX)).tokens
    wanted = tokenizer.instruct_tokenizer.tokenizer.encode(SUFFIX, bos=False, eos=False)
    is_there = any(found[start : start + len(wanted)] == wanted for start in range(len(found)))
    print(f"{'no longer true' if is_there else 'still true'}: {found}; the ids of {SUFFIX!r} are {wanted}")


if __name__ == "__main__":
    main()
