"""The keys of `adapter_config.json`: their supported values, and the keys that PEFT is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Len
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pytest_mistral_lora.chat.reading import answer_in_time, parse_json
from pytest_mistral_lora.errors import InputError, and_more, one_line, short_json
from pytest_mistral_lora.places import NOWHERE, Place

CONFIG = "adapter_config.json"
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base's weights alone."""

_MOST, _MOST_LAYERS, _LARGEST_RANK, _LARGEST_SCALE = 10_000, 1_000, 1 << 16, 1e6
_MOST_PATTERNS = (
    2_000  # the largest models have fewer than 1,000 layers, with one entry each; PEFT tries each entry on every layer
)
_LARGEST_FILE = 1 << 20  # bytes; a rank for each layer of the largest models takes 60,000
_LEVELS = 32  # a real configuration has four levels; Python's own limit depends on the caller's stack


def require_plain_sum(bias: Any, start: Any, place: Place) -> None:
    """Refuse an adapter whose merge is more than the sum of its base and its products.

    Args:
        bias: Its `bias`.
        start: Its `init_lora_weights`: PiSSA, OLoRA and others subtract B A from W before training.
        place: Its configuration file.

    Raises:
        InputError: If it has biases, or its initialisation changed the base.
    """
    if bias != "none":
        raise InputError(f"bias is {bias!r}", place=place, expected="none: Mistral's layers have no bias")
    if start not in PLAIN_STARTS:
        raise InputError(
            f"init_lora_weights is {start!r}, which changed the base's own weights before training",
            place=place,
            expected="an adapter of the base as it is",
            next_step="Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…).",
        )


def _limited(pairs: list[list[int]]) -> list[list[int]]:
    if sum(max(0, end - start) for start, end in pairs) > _MOST_LAYERS:
        raise ValueError(f"more than {_MOST_LAYERS} layers")
    return pairs


_Name = Annotated[str, Len(1, 1_000)]
_Pattern = Annotated[str, Len(1, 30_000)]
_Text = Annotated[str, Len(0, 4_096)]
_Names = Annotated[list[_Name], Len(0, _MOST)] | _Pattern
_Index = Annotated[int, Field(ge=0, lt=1 << 31)]
_Tokens = Annotated[list[_Index], Len(0, 1 << 20)]
_Rank = Annotated[int, Field(gt=0, le=_LARGEST_RANK)]
_Scale = Annotated[float, Field(gt=0, le=_LARGEST_SCALE)]
_Start = Annotated[
    str, Field(pattern=r"^(gaussian|orthogonal|eva|olora|pissa|pissa_niter_\d{1,4}|corda|loftq|lora_ga)$")
]
_Switch = bool | None


class AdapterConfig(BaseModel):
    """The supported values of an adapter's configuration; the description of a field names its right values."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: Literal["LORA"] = Field(description="LORA")
    r: _Rank = Field(description=f"the rank, a whole number from 1 to {_LARGEST_RANK}")
    lora_alpha: _Scale = Field(description="the scale, a number above 0")
    target_modules: _Names | None = Field(None, description="the names of the adapted layers")
    task_type: Literal["CAUSAL_LM"] | None = Field(None, description="CAUSAL_LM")
    bias: Literal["none", "all", "lora_only"] | None = Field(None, description="none, all or lora_only")
    use_rslora: _Switch = Field(None, description="true or false")
    use_dora: _Switch = Field(None, description="true or false")
    lora_bias: _Switch = Field(None, description="true or false")
    fan_in_fan_out: _Switch = Field(None, description="true or false")
    ensure_weight_tying: _Switch = Field(None, description="true or false")
    rank_pattern: Annotated[dict[_Pattern, _Rank], Len(0, _MOST_PATTERNS)] | None = Field(
        None, description=f"a rank from 1 to {_LARGEST_RANK} for each pattern"
    )
    alpha_pattern: Annotated[dict[_Pattern, _Scale], Len(0, _MOST_PATTERNS)] | None = Field(
        None, description="a scale above 0 for each pattern"
    )
    modules_to_save: Annotated[list[_Name], Len(0, _MOST)] | None = Field(None, description="names of modules, or null")
    exclude_modules: _Names | None = Field(None, description="names of modules, or null")
    layers_to_transform: Annotated[list[_Index], Len(0, _MOST)] | _Index | None = Field(
        None, description="indices of layers, or null"
    )
    layers_pattern: Annotated[list[_Name], Len(0, _MOST)] | _Name | None = Field(None, description="a name, or null")
    layer_replication: Annotated[list[Annotated[list[_Index], Len(2, 2)]], AfterValidator(_limited)] | None = Field(
        None, description="pairs of a first layer and the one after the last, or null"
    )
    trainable_token_indices: _Tokens | Annotated[dict[_Name, _Tokens], Len(0, 8)] | None = Field(
        None, description="ids, or null"
    )
    target_parameters: Annotated[list[_Name], Len(0, _MOST)] | None = Field(None, description="names, or null")
    init_lora_weights: bool | _Start | None = Field(
        None, description="true, false, gaussian, orthogonal, eva, olora, pissa, pissa_niter_N, corda, loftq or lora_ga"
    )
    megatron_config: Annotated[dict[str, Any], Len(0, 0)] | None = Field(
        None, description="null: PEFT would import a module that the file names"
    )
    megatron_core: Literal["megatron.core"] | None = Field(None, description="megatron.core, PEFT's own value")
    base_model_name_or_path: Any = Field(None, description="the base that it was trained on")
    revision: Any = Field(None, description="a commit of the base")


_GIVEN = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "use_dora",
    "bias",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",
    "fan_in_fan_out",
    "target_parameters",
    "ensure_weight_tying",
    "layer_replication",
)
"""Keys that decide the names, the shapes and the effect of the tensors: PEFT is given only these."""

_NOT_LOADED = (
    "auto_mapping",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "merge_weights",
    "lora_dtype",
    "lorap_lr_ratio",
    "lorap_emb_lr",
    "swift_type",
)
"""Keys of PEFT and of trainers about training or the file itself: a trained adapter works the same without them."""

_UNSUPPORTED = {
    "use_qalora": "QALoRA, which needs a quantised base",
    "alora_invocation_tokens": "aLoRA, which is on only after certain tokens",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "enable_lora": "merged layers of a PEFT before 0.3",
}


@dataclass(frozen=True, slots=True)
class KeyFault:
    """A key of a configuration that is missing, or has a value that is not supported.

    Attributes:
        found: The key with its value, as JSON, cut off if it is long.
        expected: A right value.
        supported: Whether the key is supported: then its value is the fault.
    """

    found: str
    expected: str
    supported: bool = True


def key_faults(data: Mapping[str, Any]) -> Iterator[KeyFault]:
    """Yield every fault of a configuration, one for each key; the order is that of `AdapterConfig`, then the file's."""
    known, faults = AdapterConfig.model_fields, dict[str, bool]()
    try:
        AdapterConfig.model_validate(dict(data))
    except ValidationError as error:
        faults = {str(detail["loc"][0]): detail["type"] == "missing" for detail in error.errors(include_url=False)}
    if not data.get("target_modules") and not data.get("target_parameters"):
        faults["target_modules"] = "target_modules" not in data
    for key in known:
        if key in faults:
            absent = f"{key} is missing: PEFT takes its own default"
            expected = known[key].description or ""
            yield KeyFault(absent if faults[key] else f"{key} is {short_json(data[key])}", expected)
    others = []
    for key, value in data.items():
        if key in known or key in _NOT_LOADED or not value:
            continue
        # a newer PEFT than this project knows writes its new keys with their defaults into every file
        default = None if key in _UNSUPPORTED else _peft_defaults().get(key)
        if type(default) is not type(value) or default != value:
            others.append(key)
    for key in others[:5]:
        found = f"{short_json(key).strip(chr(34))} is {short_json(data[key])}"
        feature = _UNSUPPORTED.get(key)
        reason = f"not supported here: {feature}" if feature else "no version of PEFT that is known here has this key"
        yield KeyFault(found, f"null, or no such key; {reason}", supported=False)
    if others[5:]:
        yield KeyFault(f"{len(others) - 5} more keys that are not known", "the keys of PEFT's LoraConfig", False)


@cache
def _peft_defaults() -> Mapping[str, Any]:
    from peft import LoraConfig

    return {field.name: field.default for field in fields(LoraConfig)}


def parse_adapter_config(content: bytes, file: Path) -> dict[str, Any]:
    """Return the JSON object of a configuration; its keys are not checked.

    Args:
        content: The bytes of the file.
        file: The file, for the error.

    Raises:
        InputError: If it is too large, is not a JSON object, or is nested too deeply.
    """
    if len(content) > _LARGEST_FILE:
        raise InputError("too large to be one", place=str(file), expected=f"at most {_LARGEST_FILE} bytes")
    data = parse_json(content, file)
    if not isinstance(data, dict):
        raise InputError(f"a JSON {type(data).__name__}", place=str(file), expected="a JSON object")
    if _is_nested(data, _LEVELS):
        raise InputError("JSON is nested too deeply", place=str(file), expected=f"at most {_LEVELS} levels")
    return data


def _is_nested(value: Any, levels: int) -> bool:
    if levels == 0:
        return True
    if isinstance(value, dict):
        return any(_is_nested(item, levels - 1) for item in value.values())
    return isinstance(value, list) and any(_is_nested(item, levels - 1) for item in value)


def require_supported(data: Mapping[str, Any], place: Place) -> None:
    """Refuse a configuration that has a fault.

    Raises:
        InputError: With the first fault, and the number of the others.
    """
    faults = list(key_faults(data))
    if faults:
        raise InputError(faults[0].found + and_more(1, len(faults)), place=place, expected=faults[0].expected)


def peft_config(data: Mapping[str, Any], modules: Sequence[str], place: Place) -> Any:
    """Return PEFT's `LoraConfig` of a configuration: from its supported keys only, after its patterns were tried.

    Args:
        data: The configuration.
        modules: Dotted names of the modules of the base, on which PEFT runs the patterns.
        place: The file, for errors.

    Raises:
        InputError: If a key is not supported, a pattern is invalid or takes too long, or PEFT refuses the keys.
    """
    from peft import LoraConfig

    require_supported(data, place)
    match_counts(list(patterns_of(data).values()), modules, place)
    known = {field.name for field in fields(LoraConfig)}
    given = {key: data[key] for key in _GIVEN if data.get(key) is not None}
    absent = [key for key in given if key not in known and given[key]]
    if absent:
        raise InputError(
            f"{absent[0]} is {short_json(given[absent[0]])}", place=place, expected="a newer version of PEFT"
        )
    try:
        kept = {key: value for key, value in given.items() if key in known}
        return LoraConfig(task_type="CAUSAL_LM", inference_mode=True, **kept)
    except (TypeError, ValueError) as error:
        raise InputError(f"PEFT refuses it: {one_line(error)}", place=place) from error


def patterns_of(data: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return the regular expression that PEFT makes of each pattern of a configuration, by its key and the pattern."""
    patterns: dict[tuple[str, str], str] = {}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(data.get(key), str) and data[key] != "all-linear":
            patterns[key, data[key]] = data[key]
    for key in ("rank_pattern", "alpha_pattern"):
        # PEFT matches the end of a name, from a dot on
        patterns |= {(key, pattern): rf"(.*\.)?({pattern})" for pattern in data.get(key) or {}}
    # PEFT puts the index of the layer behind this pattern
    named = data.get("layers_pattern") or []
    for pattern in [named] if isinstance(named, str) else named:
        patterns["layers_pattern", pattern] = rf".*\.{pattern}\.(\d+)\..*"
    return patterns


def match_counts(patterns: Sequence[str], names: Sequence[str], place: Place = NOWHERE) -> list[int]:
    """Return how many names each regular expression matches in full.

    Raises:
        InputError: If a pattern is not a regular expression, or takes too long.
    """
    if not patterns:
        return []
    code = (
        "import json, re, sys\n"
        "patterns, names = json.load(sys.stdin)\n"
        "print(json.dumps([sum(bool(re.fullmatch(p, n)) for n in names) for p in patterns]))"
    )
    try:
        counts: list[int] = answer_in_time(code, [list(patterns), list(names)])
    except TimeoutError as error:
        found = f"a regular expression that {error}: {short_json(list(patterns))}"
        raise InputError(found, place=place, expected="one without repetitions of repetitions") from error
    except ValueError as error:
        raise InputError(f"not a regular expression: {error}", place=place, expected="a regular expression") from error
    return counts
