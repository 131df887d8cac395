"""Record the forward passes of a text model's decoder, whoever makes the model and whatever wraps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS

_DECODERS = {text.decoder for text in TEXT_MODELS.values()}

# transformers 4 and 5.24 name the cache in a decoder's output differently.
_CACHE_KEYS = {"past_key_values", "cache"}


@dataclass(frozen=True)
class DecoderCall:
    """One forward pass of the model's decoder.

    Attributes:
        training: Whether the model was in training mode.
        ids: The input ids of all rows, flattened.
        has_cache: Whether the pass returned a key-value cache.
    """

    training: bool
    ids: tuple[int, ...]
    has_cache: bool


@contextmanager
def record_decoder_calls(
    on_call: Callable[[list[DecoderCall], Any], Any] | None = None,
) -> Iterator[list[DecoderCall]]:
    """Record every forward pass of the decoder of a text model in this process.

    Args:
        on_call: Called with the passes so far and the output of the last one, which it may change; it may raise.
    """
    # a hook for all modules: the laws must see passes whoever makes the model and whatever wraps it
    from torch.nn import Embedding
    from torch.nn.modules.module import register_module_forward_hook

    calls: list[DecoderCall] = []
    embedded: list[Any] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, Embedding):
            embedded[:] = args
        if type(module).__name__ not in _DECODERS:
            return
        # a model of images gives its text decoder embeddings in place of ids
        (ids,) = embedded
        has_cache = not _CACHE_KEYS.isdisjoint(output)
        calls.append(DecoderCall(module.training, tuple(ids.flatten().tolist()), has_cache))
        if on_call is not None:
            on_call(calls, output)

    handle = register_module_forward_hook(look, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
