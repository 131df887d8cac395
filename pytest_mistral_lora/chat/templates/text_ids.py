"""The tokens of rendered texts by a `transformers` tokenizer, and the spans that generation blocks make of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

from pytest_mistral_lora.chat.encoded import Span, SpanKind

_CALLED = ("__call__", "_encode_plus", "_batch_encode_plus", "_switch_to_input_mode", "backend_tokenizer")
"""The methods by which transformers comes from a call of the tokenizer to its backend, in versions 4 and 5."""


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the ids that the call of a tokenizer gives each text, without BOS and EOS of its own.

    If the call is transformers' own, which asks the backend and changes no id, the backend is asked for all texts at
    once, and leaves out the places of the tokens: that takes half of the time.
    """
    if _asks_backend(tokenizer):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [tuple(one.ids) for one in encoded]
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def offsets_of(tokenizer: Any, texts: Sequence[str]) -> list[tuple[tuple[int, ...], list[tuple[int, int]]]]:
    """Return the ids of some texts like `ids_of`, and for each id its place in the text."""
    if _asks_backend(tokenizer):
        encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(tuple(one.ids), one.offsets) for one in encoded]
    called = (tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts)
    return [(tuple(one["input_ids"]), one["offset_mapping"]) for one in called]


def _asks_backend(tokenizer: Any) -> bool:
    """Return whether the call of a tokenizer asks its backend, as it is set up, and does no more to the ids."""
    if not _has_plain_call(tokenizer):
        return False
    backend = tokenizer.backend_tokenizer
    settings = backend.truncation, backend.padding, backend.encode_special_tokens
    return settings == (None, None, bool(tokenizer.split_special_tokens))


def _has_plain_call(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerFast

    kind, own = type(tokenizer), vars(tokenizer)
    return all(
        name not in own and getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None)
        for name in _CALLED
    )


def block_spans(
    tokenizer: Any,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    blocks: Sequence[tuple[int, int]],
    weights: Sequence[int],
) -> Iterator[Span]:
    """Yield the spans of a row: turns of the assistant where its generation blocks are, and no turn elsewhere.

    Args:
        tokenizer: The tokenizer, which tells control tokens.
        ids: The row's ids.
        offsets: The place of each id in the text.
        blocks: The generation blocks, in order.
        weights: The weight of each block.
    """
    # asked once: transformers looks both up in lists
    special, eos = frozenset(tokenizer.added_tokens_decoder), tokenizer.eos_token_id
    owners = _owners(offsets, blocks)
    kinds = (
        "eos" if owner is not None and token == eos else "control" if token in special else "text"
        for token, owner in zip(ids, owners, strict=True)
    )
    start = 0
    for (owner, kind), run in itertools.groupby(zip(owners, kinds, strict=True)):
        end = start + len(list(run))
        role = None if owner is None else "assistant"
        yield Span(owner, role, cast("SpanKind", kind), start, end, owner is not None and bool(weights[owner]))
        start = end


def _owners(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int | None]:
    """Return for each token the generation block that it overlaps, if any; both lists are in order."""
    owners: list[int | None] = []
    block = 0
    for start, end in offsets:
        while block < len(spans) and start >= spans[block][1]:
            block += 1
        owners.append(block if block < len(spans) and end > spans[block][0] else None)
    return owners
