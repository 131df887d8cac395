"""The SentencePiece tokenizer of v3 with a tenth of its vocabulary.

Its pieces, and the ids of its markers, are those of the shipped file. Most of a tiny model are its embeddings, and most
of what a test asks of a base is to hash, load, multiply and save them, and to load 32,768 pieces.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from pytest_mistral_lora.chat.oracle import shipped_tokenizer

_MERGES = 2_500
"""Pieces of several letters that are kept, the first ones."""

_SIGNS = "▁☺"
"""A space, and what mistral-common puts in front of a suffix to fill in."""


@functools.cache
def cut_v3() -> Path:
    """Return a `tokenizer.model.v3` with Latin letters and the first words, written once for the whole run."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(shipped_tokenizer("spm-v3").read_bytes())
    texts = [piece.piece for piece in model.pieces if piece.type == piece.NORMAL]
    letters = {text for text in texts if len(text) == 1 and (text < "ƀ" or text in _SIGNS)}
    # a merge is found by its letters
    merges = [text for text in texts if len(text) > 1 and letters.issuperset(text)]
    kept = letters.union(merges[:_MERGES])
    pieces = [piece for piece in model.pieces if piece.type != piece.NORMAL or piece.piece in kept]
    model.ClearField("pieces")
    model.pieces.extend(pieces)
    model.trainer_spec.vocab_size = len(pieces)
    file = Path(_folder().name) / "tokenizer.model.v3"
    file.write_bytes(model.SerializeToString())
    return file


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cut-sentencepiece-")
