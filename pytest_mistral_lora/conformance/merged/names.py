"""The names and shapes of merged tensors: against the index of their shards, and against the base's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.architectures import spelled_name
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.records.files import inside

_INDEX = "model.safetensors.index.json"
_SHARED = ("embed_tokens.weight", "lm_head.weight")
_UNUSED = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers that older checkpoints hold, and that transformers no longer reads or writes."""


def index_findings(folder: Path, own: Weights) -> Iterator[Finding]:
    """Yield ML405 if the index names another file of a tensor than the one that holds it.

    Raises:
        InputError: If the index cannot be read.
    """
    index = folder / _INDEX
    if not index.exists():
        if len(own.files) > 1:
            yield Finding("ML405", "no such file", str(index), f"the index of {len(own.files)} shards")
        return
    data = read_json(inside(folder, _INDEX))
    listed = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(listed, dict):
        yield Finding("ML405", "has no weight_map", str(index), "the file of each tensor")
        return
    held = {name: info.file.name for name, info in own.infos.items()}
    for name in sorted(held.keys() | listed.keys()):
        if listed.get(name) != held.get(name):
            # names of an index are of any kind: repr keeps control characters from the terminal
            found = f"{name!r} is in {listed.get(name, 'no file')!r}"
            yield Finding("ML405", found, str(index), held.get(name, "a tensor that one of the files holds"))
            return


def paired_names(own: Weights, base: Weights, vocabulary: int | None) -> dict[str, str]:
    """Return the name in the base of each merged tensor that can be compared with it.

    Args:
        own: The merged tensors.
        base: The base's. A head that it has not is compared with its embeddings, which it is tied to.
        vocabulary: `vocab_size` of the merged model: with more rows than the base's, the vocabulary was resized.
    """
    names = {spelled_name(name, base): name for name in base}
    embeddings = next((name for name in base if name.endswith(_SHARED[0])), "")
    found = {}
    for name in own:
        other = names.get(spelled_name(name, own)) or (embeddings if name.endswith(_SHARED[1]) else "")
        if not other:
            continue
        shape, before = own.infos[name].shape, base.infos[other].shape
        grown = name.endswith(_SHARED) and shape[:1] == (vocabulary,) and shape[1:] == before[1:]
        if shape == before or (grown and shape[0] > before[0]):
            found[name] = other
    return found


def name_findings(own: Weights, base: Weights, pairs: Mapping[str, str], place: str) -> Iterator[Finding]:
    """Yield ML412 for each tensor that only one of the two has, and for each of another shape."""
    names = [{spelled_name(name, one): name for name in one if not _UNUSED.search(name)} for one in (own, base)]
    for name in sorted(names[0].keys() ^ names[1].keys()):
        extra = name in names[0]
        if name.endswith(_SHARED[1]) and _is_tied(own if extra else base):
            continue  # a save leaves one of two equal tensors out, or writes both
        if extra and names[0][name] in pairs:
            continue  # a head of its own: its numbers are compared with the embeddings that it was tied to
        found = f"{names[0][name]} is not in the base" if extra else f"{names[1][name]} of the base is missing"
        yield Finding("ML412", found, place, "the tensors of the base")
    for name in sorted(names[0].keys() & names[1].keys()):
        shape, expected = own.infos[names[0][name]].shape, base.infos[names[1][name]].shape
        if names[0][name] not in pairs:
            yield Finding("ML412", f"{names[0][name]} has shape {shape}", place, f"{expected}, as the base's")


def _is_tied(weights: Weights) -> bool:
    import numpy as np

    shared = [name for name in weights if name.endswith(_SHARED)]
    shapes = {weights.infos[name].shape for name in shared}
    if len(shared) < 2:
        return True
    return len(shapes) == 1 and np.array_equal(weights.array(shared[0]), weights.array(shared[1]))
