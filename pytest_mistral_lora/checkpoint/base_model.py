"""The base model of a run: the architectures that may be trained, and the loading of exactly the recorded weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.errors import InputError, PinError, RecipeError, one_line

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "MistralForCausalLM"
_MODEL_TYPE = "mistral"
_DEFAULT_WINDOW = 4096
_MOST_LAYERS = 1000
"""More than any model has: the modules of a billion layers would be made one by one."""

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: Mapping[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""The precision that each dtype of weights is."""

Device = Literal["cpu", "cuda"]


def choose_device(asked: str, *, place: str = "--device", error: type[InputError] = InputError) -> Device:
    """Return the device on which a model runs.

    Args:
        asked: `cpu`, `cuda`, or `auto` for CUDA if there is a device.
        place: The option or key that asks, for the error.
        error: The type of the error.

    Raises:
        InputError: If CUDA is asked for and there is no device; of the type `error`.
    """
    import torch

    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        found = f"cuda, but torch {torch.__version__} finds no CUDA device here"
        raise error(found, place=place, expected="auto or cpu")
    return "cuda" if available and asked != "cpu" else "cpu"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a checkpoint folder.

    Raises:
        PinError: If it is missing or is not a JSON object.
    """
    path = folder / "config.json"
    try:
        data = read_json(path)
    except InputError as error:
        raise PinError(error.found, place=str(path), expected="a checkpoint folder") from error
    if not isinstance(data, dict):
        raise PinError("is not a JSON object", place=str(path))
    return data


def require_trainable(folder: Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint that this project trains.

    Raises:
        RecipeError: If the checkpoint is of another architecture (Mistral3, Ministral3, Mixtral, …) or is quantised.
        PinError: As for `read_config`.
    """
    config = read_config(folder)
    architectures = config.get("architectures") or [config.get("model_type")]
    other = ", ".join(map(str, architectures)) if isinstance(architectures, list) else str(architectures)
    if other == ARCHITECTURE:
        other = _other_class(config)
    if other:
        raise RecipeError(
            f"the base model is {other}",
            place=str(folder / "config.json"),
            expected=f"{ARCHITECTURE}: other architectures get the tokenizer checks, but are not trained",
        )
    if config.get("quantization_config"):
        raise RecipeError("the base model is quantised", place=str(folder / "config.json"), expected="full weights")
    return config


def _other_class(config: Mapping[str, Any]) -> str:
    """Return the model that transformers' AutoModel makes of a configuration, and why, if it computes otherwise.

    The result is empty if `MistralForCausalLM` computes the same.
    """
    # AutoModel goes by `model_type`, not by `architectures`; with `layer_types` it takes a Mistral for a Ministral:
    # https://github.com/huggingface/transformers/blob/main/src/transformers/models/auto/configuration_auto.py
    kind, types = config.get("model_type", _MODEL_TYPE), config.get("layer_types")
    if kind != _MODEL_TYPE:
        return f"of model_type {kind!r}, which AutoModel does not load as {ARCHITECTURE}"
    # a Mistral has one window for all layers, and its default is not null
    plain = "full_attention" if config.get("sliding_window", _DEFAULT_WINDOW) is None else "sliding_attention"
    if types is None or (isinstance(types, list) and all(one == plain for one in types)):
        return ""
    return f"a Ministral to AutoModel: its layer_types are {_summary(types)}, and {ARCHITECTURE} has {plain} alone"


def _summary(types: Any) -> str:
    counts = Counter(map(str, types)) if isinstance(types, list) else {}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or repr(types)


def vocab_size(folder: Path) -> int:
    """Return the number of ids of the model in a checkpoint folder, as its configuration declares it.

    Raises:
        PinError: As for `read_config`.
    """
    from transformers import MistralConfig

    config = read_config(folder)
    # a model of text and images keeps the settings of its text in a part of their own
    part = config.get("text_config")
    declared = (part if isinstance(part, dict) else config).get("vocab_size")
    return declared if isinstance(declared, int) else int(MistralConfig().vocab_size)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in name order.

    A lone `consolidated.safetensors` beside a `model*.safetensors` is Mistral's own copy of the same weights, and is
    left out: transformers does not read it.

    Raises:
        PinError: If there is none; weights in pickle files are not loaded.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        found = "no weights" if folder.is_dir() else "no such folder"
        raise PinError(found, place=str(folder), expected="model.safetensors, or its shards")
    return files


def linear_layers(folder: Path) -> list[str]:
    """Return the dotted name of every linear layer of the base, in model order, without loading a weight."""
    import torch

    return [name for name, module in empty_model(folder).named_modules() if isinstance(module, torch.nn.Linear)]


def weighted_modules(folder: Path) -> list[str]:
    """Return the dotted name of every module of the base with weights of its own, without loading a weight."""
    return [name for name, module in empty_model(folder).named_modules() if list(module.parameters(recurse=False))]


def empty_model(folder: Path) -> Any:
    """Return the base without a weight: its parameters are on torch's device `meta`.

    Raises:
        PinError: If `config.json` is not the configuration of a `MistralForCausalLM`.
    """
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    place = str(require_plain(folder) / "config.json")
    try:
        config = MistralConfig.from_pretrained(folder)
        if config.num_hidden_layers > _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}")
        # a 7B base in float32 is 29 GB: only its module names and shapes are wanted here
        with torch.device("meta"):
            return MistralForCausalLM(config)
    except Exception as error:  # transformers and torch raise many types for a value of the wrong type or size
        raise PinError(
            f"no model can be made of it: {type(error).__name__}: {one_line(error)}",
            place=place,
            expected=f"the configuration of a {ARCHITECTURE}",
        ) from error


def require_plain(folder: Path) -> Path:
    """Return the folder of a checkpoint that `MistralForCausalLM` computes as AutoModel does.

    Raises:
        PinError: If AutoModel would load another class, or there is no configuration.
    """
    other = _other_class(read_config(folder))
    if other:
        raise PinError(f"the model is {other}", place=str(folder / "config.json"), expected=ARCHITECTURE)
    return folder


def load_base(folder: Path, precision: Precision, device: str) -> Any:
    """Load a `MistralForCausalLM` from a checkpoint folder, in eval mode, without a key-value cache by default.

    Args:
        folder: A checkpoint folder with safetensors weights.
        precision: The dtype of the weights, whatever the checkpoint's own.
        device: `cpu` or `cuda`.

    Raises:
        PinError: If a weight is missing in the files, or the files hold one that the model does not have, or if
            transformers' AutoModel would load another class of model.
    """
    return _load(folder, precision).to(device)


def load_nf4(folder: Path, precision: Precision, device: str) -> Any:
    """Load a base as `load_base` does, its linear layers but the head in 4 bits (NF4, double quantisation).

    Needs bitsandbytes. Norms, embeddings and head keep the precision asked for: PEFT's own preparation would make
    float32 of them, and a large vocabulary would cost more than 4 bits save.

    Args:
        folder: A checkpoint folder with safetensors weights.
        precision: The dtype of all other weights, and of the arithmetic.
        device: `cpu` or `cuda`.

    Raises:
        PinError: As for `load_base`.
    """
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(precision),
    )
    # placed while it is loaded: some versions of transformers refuse `.to()` for a model in 4 bits
    return _load(folder, precision, quantization_config=quantization, device_map={"": device})


def _load(folder: Path, precision: Precision, **options: Any) -> Any:
    from transformers import MistralForCausalLM

    weight_files(require_plain(folder))
    # transformers would load the base that this file names instead, and put the adapter on it, unread by us
    if (folder / "adapter_config.json").exists():
        found = "the folder of the base has an adapter, which transformers would put on it"
        raise PinError(found, place=str(folder / "adapter_config.json"), expected="a base without adapter")
    model, report = MistralForCausalLM.from_pretrained(
        folder,
        dtype=torch_dtype(precision),
        use_safetensors=True,
        output_loading_info=True,
        local_files_only=True,
        **options,
    )
    # transformers only warns of a missing weight, and fills it with random numbers
    wrong = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, names in wrong.items():
        if names:
            raise PinError(f"{kind.replace('_', ' ')}: {', '.join(map(str, names[:5]))}", place=str(folder))
    # training has no use for a key-value cache, and gradient checkpointing cannot work with one
    model.config.use_cache = False
    return model


def torch_dtype(precision: Precision) -> torch.dtype:
    """Return the torch dtype of a precision."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
