"""Convert equal tokenizer files once: mistral-common ships pairs that differ in their version or in images alone.

The tokenizers of a pair share the vocabulary and the merges, which nothing changes, and nothing else: tokens that are
added to one are not in the other. See benchmarks/patches.py, `conversion`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.quick_conversion import quick_conversion

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_CONVERTED: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
"""The conversion of each content. Callers get copies, which they may change."""
_ORIGINALS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""The conversion that each copy was made of, so that it lives as long as one of its copies."""


def converted_once(oracle: Oracle, convert: Callable[[], Any]) -> Any:
    """Return a conversion of a tokenizer file, which you may change.

    Args:
        oracle: The tokenizer of the file.
        convert: Makes the `transformers` tokenizer, without a chat template.
    """
    key = _content(oracle)
    original = _CONVERTED.get(key)
    if original is None:
        original = _CONVERTED[key] = convert()
    made = _copied(original, oracle)
    if made is None:
        return convert()
    _ORIGINALS[made] = original
    return made


def original_of(converted: Any) -> Any:
    """Return the conversion that a tokenizer is a copy of, which must not be changed; the tokenizer if it is no copy.

    While you hold it, a file of its content is not converted again.
    """
    return _ORIGINALS.get(converted, converted)


def _content(oracle: Oracle) -> Hashable:
    """Return what a conversion takes from a file: not the version, and nothing about images or audio."""
    of_tekken = oracle.byte_pairs
    if of_tekken is None:
        return oracle.sha256
    pattern, tokens = of_tekken
    digest = hashlib.sha256(b"".join(len(token).to_bytes(4, "big") + token for token in tokens)).digest()
    return pattern, digest, oracle.vocab_size, tuple(oracle.control_tokens.items())


def _copied(original: Any, oracle: Oracle) -> Any:
    """Return a copy of a tokenizer that shares its vocabulary; None if its added tokens would get other ids."""
    from tokenizers import Tokenizer

    theirs = original.backend_tokenizer
    own = Tokenizer(theirs.model)
    for name in _PARTS:
        part = getattr(theirs, name)
        if part is not None:
            setattr(own, name, part)
    added = theirs.get_added_tokens_decoder()
    own.add_tokens([added[token] for token in sorted(added)])
    if own.get_added_tokens_decoder() != added or own.get_vocab_size() != theirs.get_vocab_size():
        return None
    with quick_conversion():
        made = copy.deepcopy(original)
    made._tokenizer = own
    if oracle.kind == "tekken":  # it names the file that it came from
        for named in (vars(made), made.init_kwargs):
            if named.get("vocab_file"):
                named["vocab_file"] = str(oracle.path)
    return made
