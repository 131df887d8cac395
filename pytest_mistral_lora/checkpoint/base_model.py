"""The base model of a run: whether it can be trained, and the loading of exactly the recorded weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.architectures import (
    ALL,
    SUPPORTED,
    TEMPLATE_ALONE,
    Architecture,
    architecture_of,
    read_config,
    text_part,
    tie_flags,
)
from pytest_mistral_lora.checkpoint.devices import Precision, torch_dtype
from pytest_mistral_lora.checkpoint.fp8 import DequantizedWeights, fp8_layout, quantization_facts
from pytest_mistral_lora.checkpoint.weights import INDEX, Weights, read_header, read_index, weight_files
from pytest_mistral_lora.errors import (
    MistralLoraError,
    PinError,
    RecipeError,
    is_out_of_memory,
    one_line,
    short_json,
)

_COUNTS = ("num_hidden_layers", "num_local_experts", "n_routed_experts")
_MOST_MODULES = 1000  # more layers, or experts, than any model has: those of a billion would be made one by one


def require_trainable(folder: Path, backend: str = "mistral-common") -> dict[str, Any]:
    """Return the configuration of a checkpoint that this project trains.

    Args:
        folder: The checkpoint.
        backend: The recipe's; a class without a tokenizer of Mistral's is trained by `chat-template` alone.

    Raises:
        RecipeError: If the checkpoint is of another class.
        PinError: As for `read_config` and `base_weights`, or if this version of transformers does not have the class.
    """
    config, place = read_config(folder), str(folder / "config.json")
    try:
        architecture = architecture_of(config)
    except ValueError as error:
        raise RecipeError(
            f"the base model is {error}",
            place=place,
            expected=f"one of {', '.join(SUPPORTED)}; by backend: chat-template also {', '.join(TEMPLATE_ALONE)}",
            next_step="Other classes get the tokenizer checks, but are not trained.",
        ) from error
    if not architecture.text.has_oracle and backend != "chat-template":
        raise RecipeError(
            f"the base model is {architecture.name}, which no tokenizer of Mistral's is an oracle for",
            place=place,
            expected="backend: chat-template",
            next_step="Set backend: chat-template: the base's own chat template is then the only judge of ids.",
        )
    architecture.model_class(place)
    if not config.get("model_type"):
        raise PinError("no model_type: transformers does not load it", place=place, expected="the model's type")
    _refuse_adapter(folder)
    # of a commit whose weights are not fetched, the configuration is judged alone
    if sorted(folder.glob("model*.safetensors")):
        _require_fit(folder, base_weights(folder))
    else:
        quantization_facts(config, place)
    return config


def _refuse_adapter(folder: Path) -> None:
    # transformers would load the base that this file names instead, and put the adapter on it, unread by us
    if (file := folder / "adapter_config.json").exists():
        found = "the folder of the base has an adapter, which transformers loads"
        raise PinError(found, place=str(file), expected="a base without adapter")


def _require_fit(folder: Path, weights: Weights) -> None:
    """Refuse weights of another size, or of fewer layers, than the configuration declares; no number is read."""
    model, held, found = empty_model(folder), weights.infos, ""
    if model.config.model_type == "ministral" and not model.config.sliding_window:
        found, expected = "no sliding_window, without which transformers does not compute this class", "a window"
    for name, parameter in () if found else model.named_parameters():
        # a name that layer 0 lacks as well may be one that transformers converts
        if name not in held and re.sub(r"\blayers\.\d+\.", "layers.0.", name) in held:
            found, expected = f"{name} is not in the weights", "the number of layers of the weights"
        if name in held and held[name].shape != tuple(parameter.shape):
            found, expected = f"{name} would have shape {tuple(parameter.shape)}", f"{held[name].shape}, as the weights"
    if found:
        raise PinError(found, place=str(folder / "config.json"), expected=expected)


def architecture_in(folder: Path) -> Architecture:
    """Return the class of a checkpoint.

    Raises:
        PinError: As for `read_config`, or if the class is none that this project knows, or this version of transformers
            does not have it.
    """
    config, place = read_config(folder), str(folder / "config.json")
    try:
        architecture = architecture_of(config)
        architecture.model_class(place)
    except ValueError as error:
        raise PinError(f"the model is {error}", place=place, expected=f"one of {', '.join(ALL)}") from error
    return architecture


def is_tied(folder: Path) -> bool:
    """Report whether a checkpoint keeps its embeddings and its head as one tensor.

    The file of a wrapper decides, whatever its flags: some releases have none, and transformers' default differs from
    level to level (vllm-project/vllm#51063).

    Raises:
        PinError: As for `read_config`.
        InputError: As for `read_header`.
    """
    config = read_config(folder)
    files = sorted(folder.glob("model*.safetensors")) if text_part(config) is not config else []
    if files:
        return not any(name.endswith("lm_head.weight") for file in files for name in read_header(file))
    return any(tie_flags(config).values())


def base_weights(folder: Path) -> Weights:
    """Return the tensors of a checkpoint in full precision; those of an FP8 one are dequantised as they are read.

    Raises:
        PinError: If there are none, if transformers would load others, or as for `fp8_layout`.
        InputError: As for `Weights`.
    """
    config = read_config(folder)
    stored = _stored_weights(folder, config)
    layout = fp8_layout(config, stored, str(folder / "config.json"))
    if layout is None:
        return stored
    text = config.get("text_config")
    parts = (config, text if isinstance(text, dict) else {})
    named = [part[key] for part in parts for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)]
    return DequantizedWeights(stored, layout, named[0] if named else "bfloat16")


def _stored_weights(folder: Path, config: dict[str, Any]) -> Weights:
    """Return the tensors of the files that are hashed, if these are the ones that transformers loads."""
    stored = Weights(weight_files(folder))
    named, names = config.get("transformers_weights"), [file.name for file in stored.files]
    if named is not None:
        found = f"transformers_weights is {short_json(named)}, which transformers loads in place of {names[0]}"
        raise PinError(found, place=str(folder / "config.json"), expected="no such key")
    # https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py: a lone file goes first,
    # then every file that the index names, wherever it is
    if names == ["model.safetensors"]:
        return stored
    index = folder / INDEX
    if not index.is_file():
        raise PinError(f"no {INDEX}, by which transformers finds {', '.join(names[:3])}", place=str(folder))
    listed = sorted(set(read_index(index).values()))
    if listed != names:
        found = f"names the files {', '.join(map(short_json, listed[:3]))}"
        raise PinError(found, place=str(index), expected=f"those of the folder: {', '.join(names[:3])}")
    return stored


@contextmanager
def _making(architecture: Architecture, folder: Path) -> Iterator[None]:
    """Turn the errors of transformers and torch into ours: for a value of a wrong type or size, they raise many."""
    try:
        yield
    except (MistralLoraError, ImportError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise PinError(
            f"no model can be made of it: {type(error).__name__}: {one_line(error)}",
            place=str(folder / "config.json"),
            expected=f"the configuration of a {architecture.title}, and its weights",
        ) from error


def _read_model_config(model_class: Any, folder: Path) -> Any:
    config = model_class.config_class.from_pretrained(folder)
    # a value such as owner/name is code at the Hub, which transformers fetches and runs; the default is sdpa
    config._attn_implementation = None
    return config


def empty_model(folder: Path) -> Any:
    """Return the base without a weight: its parameters are on torch's device `meta`.

    Raises:
        PinError: As for `architecture_in`, or if no model can be made of the configuration.
    """
    import torch

    architecture = architecture_in(folder)
    model_class = architecture.model_class()
    with _making(architecture, folder):
        config = _read_model_config(model_class, folder)
        for part in (config.get_text_config(), getattr(config, "vision_config", None)):
            for key in _COUNTS:
                if getattr(part, key, 0) > _MOST_MODULES:
                    raise ValueError(f"{key} is {getattr(part, key)}")
        # a 7B base in float32 is 29 GB: only its module names and shapes are wanted here
        with torch.device("meta"):
            return model_class(config)


def load_base(folder: Path, precision: Precision, device: str, *, packed: bool = False) -> Any:
    """Load a base from a checkpoint folder by its class, in eval mode, without a key-value cache by default.

    FP8 weights are dequantised to the dtype asked for, on every device.

    Args:
        folder: A checkpoint folder with safetensors weights.
        precision: The dtype of the weights, whatever the checkpoint's own.
        device: `cpu` or `cuda`.
        packed: Whether weights that are stored quantised are loaded so, as `transformers` does it.

    Raises:
        PinError: As for `architecture_in`, or if a weight is missing in the files, or the files hold one that the model
            does not have.
    """
    return _load(folder, precision, packed=packed).to(device)


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


def _load(folder: Path, precision: Precision, *, packed: bool = False, **options: Any) -> Any:
    from transformers import GenerationConfig

    architecture, dtype = architecture_in(folder), torch_dtype(precision)
    _refuse_adapter(folder)
    weights = _stored_weights(folder, read_config(folder)) if packed else base_weights(folder)
    with _making(architecture, folder):
        model_class = architecture.model_class()
        config = _read_model_config(model_class, folder)
        if is_fp8 := isinstance(weights, DequantizedWeights):
            # transformers keeps FP8 weights on some devices, and takes the size of a block from the shape of the
            # scales. Given full weights, it makes them the model's own without a copy
            for part in (config, config.get_text_config()):
                vars(part).pop("quantization_config", None)
            options["state_dict"] = {name: weights[name].to(dtype) for name in weights}
        model, report = model_class.from_pretrained(
            None if is_fp8 else folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            **options,
        )
    # transformers only warns of a missing weight, and fills it with random numbers
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise PinError(f"{kind.replace('_', ' ')}: {', '.join(names[:5])}", place=str(folder))
    if is_fp8:
        model.config.name_or_path = model.name_or_path = str(folder)
    # `generate` takes what a call leaves open from here: penalties of the base would change greedy answers
    ids = {key: getattr(model.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    # Training has no use for a key-value cache, and gradient checkpointing cannot work with one. The balance of experts
    # is no part of our loss, and transformers' sum of it expects a padding mask, which a pack does not have.
    vars(model.config.get_text_config()).update(use_cache=False, output_router_logits=False)
    return model
