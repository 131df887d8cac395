"""Load a tokenizer file as mistral-common does, and a Tekken file in half the time.

mistral-common decodes each of the 131,000 tokens by itself, through four functions, for its list of pieces. Every
command on a newer checkpoint waits for it. See benchmarks/patches.py, `tekken`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from pytest_mistral_lora.chat.rebinding import rebound

_STEP = 97
"""Of the tokens of text, the 256 bytes and each 97th are compared with mistral-common's pieces."""


class QuickTekkenizer(Tekkenizer):
    """A `Tekkenizer` while it is made: it takes its pieces from one list."""

    def id_to_piece(self, token_id: int) -> str:
        """Return the text of a token, as `Tekkenizer` does."""
        return super().id_to_piece(token_id) if self._pieces is None else self._pieces[token_id]

    @cached_property
    def _pieces(self) -> Sequence[str] | None:
        """The piece of each token by its id; None for a mistral-common that makes others, or keeps them elsewhere."""
        try:
            controls = [token["token_str"] for token in self._all_special_tokens]
            ranks = self._tekken_token2id_nospecial
        except AttributeError:
            return None
        # a part of a character is decoded to U+FFFD, as tiktoken decodes it
        texts = [token.decode(errors="replace") for token in sorted(ranks, key=ranks.__getitem__)]
        pieces = [*controls, *texts]
        first = len(controls)
        compared = [*range(first + 256), *range(first + 256, len(pieces), _STEP)]
        theirs = super().id_to_piece
        return pieces if all(theirs(token) == pieces[token] for token in compared) else None


_from_file = rebound(vars(MistralTokenizer)["from_file"].__func__, Tekkenizer=QuickTekkenizer)


def load_tokenizer(path: str) -> MistralTokenizer[Any, Any, Any, Any, Any]:
    """Return what `MistralTokenizer.from_file` returns, and raise what it raises."""
    loaded: MistralTokenizer[Any, Any, Any, Any, Any] = _from_file(MistralTokenizer, path)
    made: Any = loaded.instruct_tokenizer.tokenizer
    if type(loaded.instruct_tokenizer.tokenizer) is QuickTekkenizer:
        vars(made).pop("_pieces", None)
        made.__class__ = Tekkenizer  # from here on it is mistral-common's own
    return loaded
