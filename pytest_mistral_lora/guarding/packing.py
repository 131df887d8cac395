"""Whether the first call of the model keeps the conversations of packed rows apart.

transformers makes the mask of packed rows from `position_ids` that restart, and only if it gets no `attention_mask` and
makes no key-value cache (`masking_utils._preprocess_mask_arguments`). Otherwise, each conversation attends to those
before it. Flash attention takes the edges from the same positions, with or without a cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.model_targets import MODEL_PLACE
from pytest_mistral_lora.places import Place

_MASKED = ("sdpa", "eager", "flex_attention")
"""Attention implementations that keep conversations apart by a mask alone."""
_CACHES = ("past_key_values", "cache")
"""The argument of a key-value cache, by the version of transformers."""


def arguments_of(decoder: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of the decoder by name.

    Args:
        decoder: The module that makes the mask: the model without its head, such as `MistralModel`.
        given: The arguments by position.
        named: The arguments by name.
    """
    if not given:
        return dict(named)
    parameters = list(inspect.signature(decoder.forward).parameters)
    return {**dict(zip(parameters, given, strict=False)), **named}


def judge_call(decoder: Any, call: Mapping[str, Any]) -> Result:
    """Judge the arguments of the decoder's first call in training.

    Args:
        decoder: As for `arguments_of`.
        call: The arguments by name. `position_ids` has the shape `(batch, length)`, or `(1, length)` for every row.
    """
    conversations = _most_conversations(call.get("position_ids"))
    # a mask of the caller is judged with the rows: without one, positions alone keep conversations apart
    if conversations < 2 or call.get("attention_mask") is not None:
        return Result()
    attention = str(getattr(decoder.config, "_attn_implementation", None))
    facts = (("attention", attention),)
    if "flash" in attention:
        return Result(facts=facts)
    if attention not in _MASKED:
        return Result(not_checked=f"the attention {attention!r} is not known: does it keep packed rows apart?")
    cause, place = _cause_of_cache(decoder, call)
    if not cause:
        return Result(facts=facts)
    found = f"attention {attention}: {conversations} conversations of a row see each other, since {cause}"
    fix = (
        "Set `use_cache=False` in the `TrainingArguments`, or before `train()`, if your version has no such argument: "
        "`model.config.get_text_config().use_cache = False`; a `compute_loss` of your own must not ask for a cache."
    )
    expected = "no key-value cache in training, or flash attention"
    return Result((Finding("ML313", found, Place.of(place), expected, fix=fix),), facts=facts)


def _most_conversations(positions: Any) -> int:
    """Return the number of conversations in the fullest row; a stretch of one token is padding."""
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return 1
    goes_on = torch.diff(positions, dim=-1) == 1
    begins = torch.ones_like(goes_on)
    begins[:, 1:] = ~goes_on[:, :-1]
    return int((begins & goes_on).sum(-1).max())


def _cause_of_cache(decoder: Any, call: Mapping[str, Any]) -> tuple[str, str]:
    """Return why the call makes a key-value cache and where that is set; two empty texts if it makes none."""
    for name in _CACHES:
        if call.get(name) is not None:
            return f"the model gets `{name}`", f"{MODEL_PLACE}(…, {name}=…)"
    asked = call.get("use_cache")
    wants = getattr(decoder.config, "use_cache", False) if asked is None else asked
    # checkpointed layers are computed again in the backward pass: transformers then turns the cache off
    is_checkpointed = getattr(decoder, "gradient_checkpointing", False) and decoder.training and torch.is_grad_enabled()
    if not wants or is_checkpointed:
        return "", ""
    if asked is None or asked == getattr(decoder.config, "use_cache", None):
        return "`use_cache` is true, and so a key-value cache is made", f"{MODEL_PLACE}.config"
    return "it is called with `use_cache=True`, and so makes a key-value cache", f"{MODEL_PLACE}(…, use_cache=True)"
