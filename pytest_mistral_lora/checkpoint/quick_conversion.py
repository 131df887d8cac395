"""Make transformers' conversions of Mistral tokenizer files cheaper, with the same result.

`pytest --mistral-golden` converts every tokenizer that mistral-common ships, and that was a quarter of its CPU time.
See benchmarks/patches.py, `conversion`.
"""

from __future__ import annotations

import copyreg
import gc
import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from pytest_mistral_lora.chat.rebinding import rebound

_KNOWN_MERGES = ("1f93e216e8ba5ac9",)
"""The functions of transformers that `extract_merges` equals, by the start of the SHA-256 of their source."""


@contextmanager
def quick_conversion() -> Iterator[None]:
    """Convert, save or load tokenizers without copies that nobody keeps, and without Python's collector.

    transformers copies the `tokenizers.Tokenizer` that it has just made, as JSON, and drops the first one. Lists and
    dicts of 270,000 merges let the collector walk all objects of the process several times, though none is garbage.
    """
    from tokenizers import Tokenizer

    thread = threading.get_ident()

    def not_copied(tokenizer: Any) -> Any:
        # for `copy.deepcopy`, a text means: take the object itself. Another thread gets its copy.
        return "itself" if threading.get_ident() == thread else tokenizer.__reduce_ex__(4)

    is_collecting = gc.isenabled()
    before = copyreg.dispatch_table.get(Tokenizer)
    gc.disable()
    copyreg.pickle(Tokenizer, not_copied)
    try:
        yield
    finally:
        if before is None:
            del copyreg.dispatch_table[Tokenizer]
        else:
            copyreg.dispatch_table[Tokenizer] = before
        if is_collecting:
            gc.enable()


def with_quick_merges(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Return transformers' function that converts a Tekken file, with `extract_merges` in place of its equal.

    Args:
        convert: `convert_tekken_tokenizer`. A version whose merges are made by other code is returned as it is.
    """
    converter: Any = convert.__globals__.get("MistralConverter")
    theirs = getattr(converter, "_extract_merges", None)
    if not isinstance(convert, FunctionType) or theirs is None or _source_digest(theirs) not in _KNOWN_MERGES:
        return convert
    quick = type(converter.__name__, (converter,), {"_extract_merges": staticmethod(extract_merges)})
    return rebound(convert, MistralConverter=quick)


def _source_digest(function: Callable[..., Any]) -> str:
    try:
        source = inspect.getsource(function)
    except OSError:  # an installation without sources
        return ""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def extract_merges(bpe_ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary of a Tekken file as byte-level text, and its merges in order.

    It equals `MistralConverter._extract_merges` of transformers, which makes the text of each piece again for each
    merge, and joins each two pieces to look up what it has just cut.

    Args:
        bpe_ranks: The ranks by the bytes of the tokens, in ascending order.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    ranks = {token.decode("latin-1").translate(letters): rank for token, rank in bpe_ranks.items()}
    merges: list[tuple[str, str]] = []
    for token in ranks:
        local: list[tuple[str, str]] = []
        for at in range(1, len(token)):
            left = token[:at]
            if left in ranks and (right := token[at:]) in ranks:
                local.append((left, right))
        if len(local) > 1:
            local.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += local
    return ranks, merges
