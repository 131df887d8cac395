"""What the files of a model say about its numbers: `config.json`, Mistral's own `params.json`, and a GGUF file.

One table has the names of each fact in the three formats. Readers of each format: transformers,
modeling_rope_utils.py; vllm-project/vllm, transformers_utils/configs/mistral.py; ggml-org/llama.cpp, conversion/.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.errors import InputError, shortened

DEFAULT_THETA = 10_000.0
"""The base of the rotary embedding that all readers of a GGUF file, and transformers for most classes, take."""

FP8 = "fp8"
"""`quant_method` of transformers' fine-grained FP8."""

TIE = "tie_word_embeddings"

_ROPE = ("rope_scaling", "rope_parameters")
"""The rotary embedding in `config.json`: version 4 of transformers has the first, 5 writes the second and reads both.

If a file has both, the first is read: convert_rope_params_to_dict of https://github.com/huggingface/transformers.
"""

_SCALE_BY_DEFAULT = ("ministral3", "mistral4")
_OF_DEFAULT_THETA = ("mistral", "ministral", "llama")
"""Types of models whose class in transformers takes `DEFAULT_THETA` for a missing base."""

_WINDOW, _TIE = "the window of attention", "the tie of head and embeddings"
_BASE, _MLP = "the base of the rotary embedding", "the width of the MLP"
ATTENTION_FACTOR, SCALING_TYPE = "the attention factor", "the type of scaling"
LLAMA_4_BETA, LLAMA_4_LENGTH = "the scaling of queries by position", "the length from which queries are scaled"


class ModelFacts:
    """The facts of a model's configuration, whichever version of transformers wrote it. No other module reads them.

    A fact has the type that the file gives it. It is None if the key is missing.

    Attributes:
        config: The configuration: a `config.json`, or that of a model in memory.
        text: The part that describes the text model: its `text_config`, or all of it.
        layers: Number of decoder layers.
        heads: Number of heads of queries.
        kv_heads: Number of heads of keys and values.
        vocabulary: Number of ids.
        window: Number of tokens that a token sees.
        layer_types: The kind of each layer's attention.
        context: Number of positions.
        ropes: The rotary embedding that transformers reads: its mapping, or one for each type of layers.
        rope: The mapping, if it is one for all layers; else an empty one.
        rope_key: The key of `rope`; empty if it is empty.
        rope_theta: Base of the rotary embedding.
        rope_type: Kind of its scaling.
        quantization: How the weights are quantised; an empty object counts, and transformers does not load it.
    """

    def __init__(self, config: Any) -> None:
        self.config: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        part = self.config.get("text_config")
        self.text = text = part if isinstance(part, dict) else self.config
        self.layers = text.get("num_hidden_layers")
        self.heads = text.get("num_attention_heads")
        self.kv_heads = text.get("num_key_value_heads", self.heads)
        self.vocabulary = text.get("vocab_size", self.config.get("vocab_size"))
        self.window = text.get("sliding_window")
        self.layer_types = text.get("layer_types")
        self.context = text.get("max_position_embeddings")
        key = next((key for key in _ROPE if isinstance(text.get(key), dict) and text[key]), "")
        rope: Mapping[str, Any] = text.get(key, {})
        by_layers: list[Mapping[str, Any]] = [part for part in rope.values() if isinstance(part, dict)]
        self.ropes = by_layers or [rope] * bool(rope)
        self.rope, self.rope_key = ({}, "") if by_layers else (rope, key)
        self.rope_theta = self.rope.get("rope_theta", text.get("rope_theta"))
        self.rope_type = self.rope.get("rope_type") or self.rope.get("type")
        self.quantization = self.config.get("quantization_config", text.get("quantization_config"))

    @property
    def is_wrapped(self) -> bool:
        """Whether the text model is a part of a model of text and images."""
        return self.text is not self.config

    @property
    def is_fp8(self) -> bool:
        """Whether the configuration declares FP8 weights as transformers writes them; nothing is checked."""
        return isinstance(self.quantization, dict) and self.quantization.get("quant_method") == FP8

    @property
    def is_packed(self) -> bool:
        """Whether the configuration declares weights that are quantised in another way."""
        return self.quantization is not None and not self.is_fp8

    @property
    def levels(self) -> Mapping[str, Mapping[str, Any]]:
        """The whole, and the part of the text model if it is one, by what stands before a key."""
        return {"": self.config} | ({"text_config.": self.text} if self.is_wrapped else {})

    @property
    def ties(self) -> Mapping[str, bool]:
        """Each flag about tied embeddings, by its key, at the top and in `text_config`."""
        flags = {f"{level}{TIE}": part.get(TIE) for level, part in self.levels.items()}
        return {key: value for key, value in flags.items() if isinstance(value, bool)}

    @property
    def dtype(self) -> str | None:
        """Name of the dtype of the weights: transformers 4 named the key `torch_dtype`."""
        named = (part.get(key) for part in self.levels.values() for key in ("dtype", "torch_dtype"))
        return next((dtype for dtype in named if isinstance(dtype, str)), None)

    @property
    def rope_values(self) -> Mapping[str, Any]:
        """The values of the rotary embedding in one form, with its base, and its kind as `rope_type`."""
        values = {"rope_theta": self.rope_theta, **self.rope, "rope_type": self.rope_type or "default", "type": None}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class FactKeys:
    """A fact about a model's numbers, by its names in the three formats.

    Attributes:
        title: What it is, in words.
        config: Its key in `config.json`; `rope.` stands for either spelling of the rotary embedding.
        params: Its key in `params.json`.
        gguf: Its key in a GGUF file, behind the name of the architecture.
        of_latent: Whether the names mean the same for a model with latent attention.
    """

    title: str
    config: str = ""
    params: str = ""
    gguf: str = ""
    of_latent: bool = True


FACTS = (
    FactKeys("the number of layers", "num_hidden_layers", "n_layers", "block_count"),
    FactKeys("the longest context", "max_position_embeddings", "", "context_length"),
    FactKeys("the width", "hidden_size", "dim", "embedding_length"),
    FactKeys(_MLP, "intermediate_size", "hidden_dim", "feed_forward_length", of_latent=False),
    FactKeys("the number of heads", "num_attention_heads", "n_heads", "attention.head_count"),
    FactKeys(
        "the number of heads of keys", "num_key_value_heads", "n_kv_heads", "attention.head_count_kv", of_latent=False
    ),
    FactKeys("the width of a head", "head_dim", "head_dim", "attention.key_length", of_latent=False),
    FactKeys("the width of a head's values", "head_dim", "", "attention.value_length", of_latent=False),
    FactKeys("the epsilon of norms", "rms_norm_eps", "norm_eps", "attention.layer_norm_rms_epsilon"),
    FactKeys("the size of the vocabulary", "vocab_size", "vocab_size", "vocab_size"),
    FactKeys(_WINDOW, "sliding_window", "sliding_window", "attention.sliding_window"),
    FactKeys(_TIE, "tie_word_embeddings", "tied_embeddings"),
    FactKeys(_BASE, "rope_theta", "rope_theta", "rope.freq_base"),
    FactKeys(SCALING_TYPE, "rope.rope_type", "yarn", "rope.scaling.type"),
    FactKeys("the factor of scaling", "rope.factor", "yarn.factor", "rope.scaling.factor"),
    FactKeys(
        "the length before scaling",
        "rope.original_max_position_embeddings",
        "yarn.original_max_position_embeddings",
        "rope.scaling.original_context_length",
    ),
    FactKeys("YaRN's fast bound", "rope.beta_fast", "yarn.beta", "rope.scaling.yarn_beta_fast"),
    FactKeys("YaRN's slow bound", "rope.beta_slow", "yarn.alpha", "rope.scaling.yarn_beta_slow"),
    FactKeys(
        ATTENTION_FACTOR,
        "rope.mscale_all_dim",
        "yarn.apply_scale",
        "rope.scaling.yarn_log_multiplier",
        of_latent=False,
    ),
    FactKeys(LLAMA_4_BETA, "rope.llama_4_scaling_beta", "llama_4_scaling.beta", "attention.temperature_scale"),
    FactKeys(
        LLAMA_4_LENGTH,
        "rope.original_max_position_embeddings",
        "llama_4_scaling.original_max_position_embeddings",
        "attention.temperature_length",
    ),
)
"""The facts that the formats share.

Each file stores an attention factor in another way: `mscale` and `mscale_all_dim`, `apply_scale`, a logarithm's
multiplier. They are compared as the number by which cosine and sine are multiplied. The tie is not compared with a GGUF
file, which may hold an equal head.
"""

_LARGEST = 1e300
"""Numbers from here on are taken for no numbers."""

_REQUIRED_IN_GGUF = ("block_count", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon")
_SCALED = ("yarn", "linear")
"""Types of scaling whose keys are compared: the others are stored in a form of each format."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What a file states about a fact.

    Attributes:
        value: The value; None if there is none, such as no window.
        key: Its key in the file.
        written: The value as the file has it, if that is not `value`.
        effect: What a reader makes of it, if that is not the value itself; else empty.
    """

    value: Any
    key: str
    written: str = ""
    effect: str = ""

    @property
    def text(self) -> str:
        """The value in words, as the file has it."""
        return self.written or shown(self.value)

    @property
    def as_found(self) -> str:
        """The key with its value, as what was found."""
        return f"{self.key} is {self.text}{self.effect and f': {self.effect}'}"

    def as_expected(self, source: str) -> str:
        """The value with its key and file, as what was expected."""
        return f"{self.text}, {self.key} of {source}{self.effect and f': {self.effect}'}"


StatedFacts = Mapping[str, Stated]
"""What a file states, by the title of the fact."""


def facts_of_config(config: Mapping[str, Any]) -> StatedFacts:
    """Return what `config.json` states, whichever version of transformers wrote it."""
    facts = ModelFacts(config)
    text = {**config, **facts.text}
    rope, spelling, kind, model_type = facts.rope, facts.rope_key, facts.rope_type, text.get("model_type")
    if kind is None and not any(text.get(key) for key in _ROPE) and model_type not in _SCALE_BY_DEFAULT:
        kind = "default"
    found = {}
    for fact in FACTS:
        head, _, name = fact.config.rpartition(".")
        key = f"{spelling or _ROPE[1]}.{name}" if head else name
        value = rope.get(name) if head else text.get(name)
        if value is not None:
            found[fact.title] = Stated(value, key)
    if "sliding_window" in text:
        found[_WINDOW] = Stated(text["sliding_window"], "sliding_window")
    if (theta := rope.get("rope_theta")) is not None:
        found[_BASE] = Stated(theta, f"{spelling}.rope_theta")
    elif _BASE not in found and model_type in _OF_DEFAULT_THETA:
        found[_BASE] = Stated(DEFAULT_THETA, "rope_theta", "missing")
    found.pop(_TIE, None)
    if len(set(facts.ties.values())) == 1:  # flags that differ are the fault that another rule reports
        key, value = next(iter(facts.ties.items()))
        found[_TIE] = Stated(value, key)
    key = f"{spelling}.{'rope_type' if 'rope_type' in rope else 'type'}" if spelling else _ROPE[1]
    _put_scaling(found, kind, key, "" if spelling else "missing")
    if kind == "yarn" and (factor := _factor_of_rope(rope)) is not None:
        is_given = rope.get("attention_factor") is not None
        key, written = ("attention_factor", "") if is_given else ("mscale_all_dim", _shown_scale(rope))
        found[ATTENTION_FACTOR] = Stated(factor, f"{spelling}.{key}", written, _effect(factor))
    else:
        found.pop(ATTENTION_FACTOR, None)
    if spelling and LLAMA_4_BETA not in found:
        found[LLAMA_4_BETA] = Stated(0, f"{spelling}.llama_4_scaling_beta", "missing")
    return _without_latent(found, text.get("kv_lora_rank"))


def spelling_conflicts(config: Mapping[str, Any]) -> Iterator[tuple[Stated, Stated]]:
    """Yield each value that `config.json` has in both spellings of the rotary embedding, with two different values."""
    text = {**config, **ModelFacts(config).text}
    old, new = (text.get(key) for key in _ROPE)
    if not isinstance(new, dict) or not isinstance(old, dict):
        return
    values = [{("rope_type" if key == "type" else key): value for key, value in part.items()} for part in (new, old)]
    for key in sorted(values[0].keys() & values[1].keys()):
        if not _is_alike(values[0][key], values[1][key]):
            first, second = (Stated(part[key], f"{name}.{key}") for name, part in zip(_ROPE[::-1], values, strict=True))
            yield first, second


def read_params(file: Path) -> Mapping[str, Any]:
    """Return the object of a `params.json`.

    Raises:
        InputError: If it cannot be read, or is no JSON object.
    """
    data = read_json(file)
    if not isinstance(data, dict):
        raise InputError("is not a JSON object", place=str(file), expected="Mistral's own configuration")
    return data


def facts_of_params(params: Mapping[str, Any]) -> StatedFacts:
    """Return what Mistral's own `params.json` states."""
    found = {}
    for fact in FACTS:
        value: Any = params
        for name in fact.params.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if fact.params and value is not None:
            found[fact.title] = Stated(value, fact.params)
    if isinstance(window := params.get("sliding_window"), list):
        # a window for each layer of a group, null where a layer has none
        widths = [width for width in window if width is not None]
        found.pop(_WINDOW)
        if all(width == widths[0] for width in widths):
            found[_WINDOW] = Stated(widths[0] if widths else None, "sliding_window", shortened(window))
    elif window is None:
        # its readers then have none
        found[_WINDOW] = Stated(None, "sliding_window", "missing")
    yarn, moe = params.get("yarn"), params.get("moe")
    if isinstance(moe, Mapping) and "expert_hidden_dim" in moe:
        found.pop(_MLP, None)
    scaling = yarn if isinstance(yarn, Mapping) else {}
    _put_scaling(found, "yarn" if scaling else "default", "yarn", "given" if scaling else "missing")
    found.pop(ATTENTION_FACTOR, None)
    scales, factor = scaling.get("apply_scale"), scaling.get("factor")
    if isinstance(scales, bool) and _is_number(factor):
        number = _mscale(factor) if scales else 1.0
        found[ATTENTION_FACTOR] = Stated(number, "yarn.apply_scale", shown(scales), _effect(number))
    if LLAMA_4_BETA not in found:
        found[LLAMA_4_BETA] = Stated(0, "llama_4_scaling", "missing")
    return _without_latent(found, params.get("kv_lora_rank"))


def facts_of_gguf(fields: Mapping[str, Any], architecture: str) -> StatedFacts:
    """Return what the fields of a GGUF file state, with the values that its readers take for missing ones.

    Args:
        fields: The fields by their names.
        architecture: The name before each of its keys.
    """
    found = {}
    for fact in FACTS:
        key = f"{architecture}.{fact.gguf}"
        value = fields.get(key)
        if fact.gguf and (value is not None or fact.gguf in _REQUIRED_IN_GGUF):
            found[fact.title] = Stated(value, key, "missing" if value is None else "")
    found.setdefault(_BASE, Stated(DEFAULT_THETA, f"{architecture}.rope.freq_base"))
    prefix = f"{architecture}.rope.scaling"
    kind = fields.get(f"{prefix}.type")
    given = "default" if kind in (None, "none") else kind
    _put_scaling(found, given, f"{prefix}.type", "missing" if kind is None else "")
    if kind in _SCALED:
        for fact in FACTS:
            if fact.gguf in ("rope.scaling.factor", "rope.scaling.original_context_length"):
                key = f"{architecture}.{fact.gguf}"
                found.setdefault(fact.title, Stated(None, key, "missing"))
    key, written = f"{prefix}.yarn_log_multiplier", fields.get(f"{prefix}.yarn_log_multiplier")
    factor = fields.get(f"{prefix}.factor")
    found.pop(ATTENTION_FACTOR, None)
    # what readers make of these two is not known here
    is_plain = not any(f"{prefix}.{name}" in fields for name in ("attn_factor", "yarn_attn_factor"))
    if kind == "yarn" and is_plain and _is_number(factor) and (written is None or _is_number(written)):
        divisor = 1.0 if written is None or not written else _mscale(factor, written)
        state = "missing" if written is None else shown(written)
        if divisor:
            found[ATTENTION_FACTOR] = Stated(_mscale(factor) / divisor, key, state, _effect(_mscale(factor) / divisor))
    if LLAMA_4_BETA not in found:
        found[LLAMA_4_BETA] = Stated(0, f"{architecture}.attention.temperature_scale", "missing")
    return found


def contradictions(first: StatedFacts, second: StatedFacts) -> Iterator[tuple[Stated, Stated]]:
    """Yield what two files state about each fact on which they differ, in the order of the table.

    The keys of a scaling are compared only if both files scale alike: another type is one difference.
    """
    kinds = [facts[SCALING_TYPE].value for facts in (first, second) if SCALING_TYPE in facts]
    are_scaled = len(kinds) == 2 and kinds[0] == kinds[1] and kinds[0] in _SCALED
    of_scaling = {fact.title for fact in FACTS if fact.gguf.startswith("rope.scaling.")} - {SCALING_TYPE}
    scales = all(bool(facts[LLAMA_4_BETA].value) for facts in (first, second) if LLAMA_4_BETA in facts)
    for fact in FACTS:
        if fact.title not in first or fact.title not in second:
            continue
        if (fact.title in of_scaling and not are_scaled) or (fact.title == LLAMA_4_LENGTH and not scales):
            continue
        if not _is_alike(first[fact.title].value, second[fact.title].value):
            yield first[fact.title], second[fact.title]


def shown(value: Any) -> str:
    """Return a value of a configuration for a message."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if _is_number(value) else shortened(value)


def _put_scaling(found: dict[str, Stated], kind: Any, key: str, written: str) -> None:
    """Set the type of scaling; one that the formats write differently is left out."""
    found.pop(SCALING_TYPE, None)
    if kind in (*_SCALED, "default"):
        found[SCALING_TYPE] = Stated(kind, key, written)


def _without_latent(found: dict[str, Stated], is_latent: Any) -> StatedFacts:
    left_out = {fact.title for fact in FACTS if is_latent and not fact.of_latent}
    return {title: stated for title, stated in found.items() if title not in left_out}


def _factor_of_rope(rope: Mapping[str, Any]) -> float | None:
    """Return the number by which transformers multiplies cosine and sine; None if a value is no number."""
    factor, given = rope.get("factor"), rope.get("attention_factor")
    if given is not None:
        return float(given) if _is_number(given) else None
    scale, others = rope.get("mscale"), rope.get("mscale_all_dim")
    if not _is_number(factor) or not all(one is None or _is_number(one) for one in (scale, others)):
        return None
    # transformers takes a zero for a missing value
    divisor = _mscale(factor, others) if scale and others else 1.0
    return _mscale(factor, scale if scale and others else 1.0) / divisor if divisor else None


def _shown_scale(rope: Mapping[str, Any]) -> str:
    scales = [rope.get("mscale_all_dim"), rope.get("mscale")]
    first, second = ("missing" if scale is None else shown(scale) for scale in scales)
    return f"{first} beside mscale {second}"


def _effect(factor: float) -> str:
    return f"cosine and sine are multiplied by {factor:.4g}"


def _mscale(factor: float, scale: float = 1.0) -> float:
    """Return YaRN's magnitude for a factor of the context: 0.1 * scale * ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _is_number(value: Any) -> TypeGuard[float]:
    # a file can have an integer of thousands of digits, which is no float, and a NaN
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _is_alike(first: Any, second: Any) -> bool:
    if _is_number(first) and _is_number(second):
        return math.isclose(first, second, rel_tol=1e-5)  # a GGUF file has float32
    return bool(first == second)
