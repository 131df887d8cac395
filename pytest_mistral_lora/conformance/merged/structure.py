"""The form of a merged model: its configuration, its index, and the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.architectures import spelled_name
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.model_facts import DEFAULT_THETA, TIE, ModelFacts
from pytest_mistral_lora.checkpoint.tokenizer_folder import GENERATION_CONFIG, MODEL_CONFIG
from pytest_mistral_lora.checkpoint.weights import INDEX, Weights
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import inside

_FREE = {
    # how the model is stored, loaded and trained
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "name_or_path",
    "use_cache",
    "auto_map",
    "initializer_range",
    "attention_dropout",
    "attn_implementation",
    "_attn_implementation",
    "is_decoder",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    "pruned_heads",
    "id2label",
    "label2id",
    "problem_type",
    "use_return_dict",
    "chunk_size_feed_forward",
    "pretraining_tp",
    "router_jitter_noise",
    "router_aux_loss_coef",
    "output_router_logits",
    "use_bfloat16",
    "tf_legacy_loss",
    # judged by another rule, or by the tokenizer
    TIE,
    "quantization_config",
    "text_config",
    "vocab_size",
    "pad_token_id",
    "architectures",
    "model_type",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "head_dim",
    "eos_token_id",
    "bos_token_id",
}
"""Keys that may differ, or that are not compared by their value."""

HEADS = ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size", "num_hidden_layers")


def difference_findings(
    merged: Mapping[str, Any], base: Mapping[str, Any], place: Place, source: str = "the base's"
) -> Iterator[Finding]:
    """Yield ML435 for each value that affects the computation and differs from the base's, in any spelling.

    Args:
        merged: `config.json` of the merged model.
        base: `config.json` of the base.
        place: The merged model's file.
        source: Where the values of the base are, in words behind `as`.
    """
    names = []
    for config in (merged, base):
        classes = config.get("architectures")
        name = str(classes[0]) if isinstance(classes, list) and classes else str(config.get("model_type"))
        # AutoModel loads a Mistral configuration with layer_types as Ministral, and saves it under that name
        is_renamed = name == "MistralForCausalLM" and ModelFacts(config).layer_types
        names.append("MinistralForCausalLM" if is_renamed else name)
    if names[0] != names[1]:
        yield Finding("ML435", f"the architecture is {names[0]}", place, f"{names[1]}, as {source}")
    values = [_numbers(config) for config in (merged, base)]
    if not any(ModelFacts(config).layer_types for config in (merged, base)):
        for numbers in values:
            del numbers["layer_types"]  # both follow from sliding_window, which is compared
    facts = ModelFacts(merged)
    own = {*merged, *facts.text, *facts.rope}
    for key in sorted(values[0].keys() | values[1].keys()):
        found, expected = (numbers.get(key, _MISSING) for numbers in values)
        # a key that only the merged model has, and that transformers does not know, is a tool's note
        if expected is _MISSING or found == expected or (found is _MISSING and expected is None):
            continue
        if found is _MISSING and key.startswith("top."):
            continue  # transformers renames keys of a wrapper, and reads both names
        state = "is missing" if found is _MISSING else f"is {found!r}"
        is_default = found is not _MISSING and not key.startswith("rope.") and key not in own
        default = ", the default: the key is missing" if is_default else ""
        yield Finding("ML435", f"{key} {state}{default}", place, f"{expected!r}, as {source}")


def end_findings(folder: BaseFolder, base: BaseFolder) -> Iterator[Finding]:
    """Yield ML435 if a merged model stops at other tokens than its base: `generation_config.json` decides.

    Raises:
        InputError: If one of the files cannot be read.
    """
    ends = [_ends(model_folder) for model_folder in (folder, base)]
    has_own = (folder.path / GENERATION_CONFIG).exists()
    if (has_own or (base.path / GENERATION_CONFIG).exists()) and ends[1] and ends[0] != ends[1]:
        found = f"eos_token_id is {ends[0]}" if has_own else f"is missing: eos_token_id is {ends[0]}, of config.json"
        yield Finding("ML435", found, Place.of(folder.path / GENERATION_CONFIG), f"{ends[1]}, as the base's")


def _ends(folder: BaseFolder) -> list[Any]:
    """Return the ids at which the model of a folder stops, sorted; empty if no file names one.

    Raises:
        InputError: If a file cannot be read.
    """
    names = [name for name in (GENERATION_CONFIG, MODEL_CONFIG) if (folder.path / name).exists()]
    configs = [ModelFacts(data).text for data in map(folder.read_json, names) if isinstance(data, dict)]
    given: Any = next((data["eos_token_id"] for data in configs if data.get("eos_token_id") is not None), [])
    return sorted(given, key=str) if isinstance(given, list) else [given]


def answer_findings(folder: BaseFolder, base: BaseFolder | None) -> Iterator[Finding]:
    """Yield ML240 and ML241 for what the generation configuration of a merged model does to its answers.

    A setting that the base has as well is not reported again if it only changes an answer (ML241).

    Args:
        folder: The merged model's folder.
        base: The base; None if it is not at hand.

    Raises:
        InputError: If one of the files cannot be read.
    """
    # a merge that lost an end may forbid it all the same
    ends = {end for model in (folder, base) if model is not None for end in _ends(model) if type(end) is int}
    of_base = set() if base is None else {finding.found for finding in _generation_findings(base, ends)}
    for finding in _generation_findings(folder, ends):
        if finding.rule == "ML240" or finding.found not in of_base:
            yield finding


def _generation_findings(folder: BaseFolder, ends: set[int]) -> Iterator[Finding]:
    from pytest_mistral_lora.conformance.tokenizer.generation import generation_findings

    file = folder.path / GENERATION_CONFIG
    config = folder.read_json(GENERATION_CONFIG) if file.exists() else None
    if isinstance(config, dict):
        yield from generation_findings(config, ends, Place.of(file))


_MISSING: Any = object()
"""The value of a missing key without a default."""


def _defaults(model_type: Any) -> dict[str, Any]:
    """Return the values that transformers takes for missing keys."""
    from transformers import CONFIG_MAPPING

    try:
        values: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict() if isinstance(model_type, str) else {}
    except Exception:  # an unknown class, or a class that needs arguments
        return {}
    return values


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that affect a model's computation, in one form for all versions of transformers."""
    facts = ModelFacts(config)
    text, defaults = facts.text, _defaults(facts.text.get("model_type"))
    # transformers reads no other keys of a class that it knows: they are a tool's notes
    given = {key: value for key, value in text.items() if key not in _FREE and (key in defaults or not defaults)}
    values = {key: value for key, value in defaults.items() if key not in _FREE} | given
    heads, window, layers = (values.get(key) for key in ("num_attention_heads", "sliding_window", "num_hidden_layers"))
    if isinstance(heads, int) and heads and isinstance(values.get("hidden_size"), int):
        values["head_dim"] = text.get("head_dim") or values["hidden_size"] // heads
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    kinds = facts.layer_types or ["sliding_attention" if window else "full_attention"] * (
        layers if isinstance(layers, int) and 0 <= layers < 10_000 else 0
    )
    values["layer_types"] = kinds
    # with these, a server may make biases that the file lacks, even for a class that ignores them in transformers
    for key in ("attention_bias", "mlp_bias"):
        values.setdefault(key, bool(text.get(key)))
    rope = dict(facts.rope_values)
    values["rope_theta"] = rope.pop("rope_theta", None) or ModelFacts(defaults).rope_theta or DEFAULT_THETA
    values |= {f"rope.{key.removeprefix('rope_')}": value for key, value in rope.items()}
    for key in ("bos_token_id", "eos_token_id"):
        ids = text.get(key, config.get(key))
        if ids is not None:
            values[key] = sorted(ids, key=str) if isinstance(ids, list) else [ids]
    if facts.is_wrapped:
        # the wrapper's own numbers, such as the layer to read from the vision tower
        plain = (pair for pair in config.items() if pair[1] is not None and not isinstance(pair[1], dict | list))
        values |= {f"top.{key}": value for key, value in plain if key not in _FREE}
    return {key: value for key, value in values.items() if not key.startswith("_")}


def own_findings(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: Place) -> Iterator[Finding]:
    """Yield ML435 for each value that contradicts the weights or another key.

    Args:
        config: `config.json` of the model.
        shapes: The shape of each tensor of the model, by name.
        place: The file.
    """
    facts = ModelFacts(config)
    theta = facts.text.get("rope_theta")
    if theta is not None and theta != facts.rope_theta:
        yield Finding("ML435", f"rope_theta is {theta!r}", place, f"{facts.rope_theta!r}, as in {facts.rope_key}")
    values = _numbers(config)
    sizes = {key: value for key in (*HEADS, "head_dim") if isinstance(value := values.get(key), int)}
    sizes |= {"vocab_size": facts.vocabulary} if isinstance(facts.vocabulary, int) else {}
    heads, pairs, width = (sizes.get(key, 0) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    # rows of each matrix, as transformers builds it
    rows = {
        "embed_tokens": ("vocab_size", sizes.get("vocab_size")),
        "lm_head": ("vocab_size", sizes.get("vocab_size")),
        "self_attn.q_proj": ("num_attention_heads * head_dim", heads * width),
        "self_attn.k_proj": ("num_key_value_heads * head_dim", pairs * width),
        "self_attn.v_proj": ("num_key_value_heads * head_dim", pairs * width),
        "self_attn.o_proj": ("hidden_size", sizes.get("hidden_size")),
        "mlp.up_proj": ("intermediate_size", sizes.get("intermediate_size")),
    }
    told = set()
    for name, shape in shapes.items():
        kind = next((part for part in rows if name.endswith(f"{part}.weight") and "vision" not in name), None)
        if kind is None or rows[kind][0] in told or not shape or not rows[kind][1]:
            continue
        if shape[0] != rows[kind][1]:
            told.add(rows[kind][0])
            found = f"{rows[kind][0]} is {rows[kind][1]}"
            yield Finding("ML435", found, place, f"{shape[0]}, the rows of {name}")


def tie_findings(config: Mapping[str, Any], merged: Weights, place: Place) -> Iterator[Finding]:
    """Yield ML436 for each flag about tied embeddings, at the top or in `text_config`, that contradicts the file."""
    import numpy as np

    heads = [name for name in merged if name.endswith("lm_head.weight")]
    embeddings = [name for name in merged if name.endswith("embed_tokens.weight")]
    given = ModelFacts(config).ties
    if not embeddings:
        return
    if not heads:
        for key in [key for key, value in given.items() if not value] if given else [TIE]:
            found = f"{key} is {'false' if given else 'missing'}, and the file has no lm_head.weight"
            yield Finding("ML436", found, place, f'"{TIE}": true at every level, or the head in the file')
        return
    head, embedding = merged.array(heads[0]), merged.array(embeddings[0])
    if head.shape == embedding.shape and np.array_equal(head, embedding):
        return  # both are equal: the numbers are right with any flag
    for key, value in given.items():
        if value:
            found = f"{key} is true, and {heads[0]} is not {embeddings[0]}: a server drops the head"
            yield Finding("ML436", found, place, f'"{TIE}": false at every level')


_SHARED = ("embed_tokens.weight", "lm_head.weight")

_UNUSED = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers of older checkpoints that transformers no longer reads or writes."""


def index_findings(folder: Path, merged: Weights) -> Iterator[Finding]:
    """Yield ML405 if the index names the wrong file for a tensor.

    Raises:
        InputError: If the index cannot be read.
    """
    index = folder / INDEX
    if not index.exists():
        if len(merged.files) > 1:
            yield Finding("ML405", "no such file", Place.of(index), f"the index of {len(merged.files)} shards")
        return
    data = read_json(inside(folder, INDEX))
    listed = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(listed, dict):
        yield Finding("ML405", "has no weight_map", Place.of(index), "the file of each tensor")
        return
    actual = {name: info.file.name for name, info in merged.infos.items()}
    for name in sorted(actual.keys() | listed.keys()):
        if listed.get(name) != actual.get(name):
            # names in an index can be anything: repr keeps control characters from the terminal
            found = f"{name!r} is in {listed.get(name, 'no file')!r}"
            yield Finding("ML405", found, Place.of(index), actual.get(name, "a tensor that one of the files holds"))
            return


def paired_names(merged: Weights, base: Weights, vocabulary: int | None) -> dict[str, str]:
    """Return the name in the base of each comparable merged tensor.

    Args:
        merged: The merged tensors.
        base: The base's tensors. A missing head is compared with the embeddings that it is tied to.
        vocabulary: `vocab_size` of the merged model: with more rows than the base's, the vocabulary was resized.
    """
    names = {spelled_name(name, base): name for name in base}
    embeddings = next((name for name in base if name.endswith(_SHARED[0])), "")
    found = {}
    for name in merged:
        other = names.get(spelled_name(name, merged)) or (embeddings if name.endswith(_SHARED[1]) else "")
        if not other:
            continue
        shape, before = merged.infos[name].shape, base.infos[other].shape
        grown = name.endswith(_SHARED) and shape[:1] == (vocabulary,) and shape[1:] == before[1:]
        if shape == before or (grown and shape[0] > before[0]):
            found[name] = other
    return found


def name_findings(merged: Weights, base: Weights, pairs: Mapping[str, str], place: Place) -> Iterator[Finding]:
    """Yield ML412 for each tensor that only one of the two has, and for each with another shape."""
    import numpy as np

    names = [
        {spelled_name(name, tensors): name for name in tensors if not _UNUSED.search(name)}
        for tensors in (merged, base)
    ]
    for name in sorted(names[0].keys() ^ names[1].keys()):
        extra = name in names[0]
        if name.endswith(_SHARED[1]):
            weights = merged if extra else base
            shared = [tensor_name for tensor_name in weights if tensor_name.endswith(_SHARED)]
            is_one_shape = len({weights.infos[tensor_name].shape for tensor_name in shared}) == 1
            if len(shared) < 2 or (is_one_shape and np.array_equal(weights.array(shared[0]), weights.array(shared[1]))):
                continue  # a save leaves one of two equal tensors out, or writes both
        if extra and names[0][name] in pairs:
            continue  # a separate head: its numbers are compared with the embeddings that it was tied to
        found = f"{names[0][name]} is not in the base" if extra else f"{names[1][name]} of the base is missing"
        yield Finding("ML412", found, place, "the tensors of the base")
    for name in sorted(names[0].keys() & names[1].keys()):
        shape, expected = merged.infos[names[0][name]].shape, base.infos[names[1][name]].shape
        if names[0][name] not in pairs:
            yield Finding("ML412", f"{names[0][name]} has shape {shape}", place, f"{expected}, as the base's")
