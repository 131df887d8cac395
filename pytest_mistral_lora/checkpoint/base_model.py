"""The base model of a run: whether it can be trained, and the loading of exactly the recorded weights."""

from __future__ import annotations

import math
import re
from typing import Any

from pytest_mistral_lora.chat.reading import in_utf8
from pytest_mistral_lora.checkpoint.architectures import SUPPORTED, TEMPLATE_ALONE, architecture_of
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.devices import Precision, torch_dtype
from pytest_mistral_lora.checkpoint.fp8 import DequantizedWeights, quantization_facts
from pytest_mistral_lora.checkpoint.tokenizer_folder import GENERATION_CONFIG
from pytest_mistral_lora.errors import PinError, RecipeError
from pytest_mistral_lora.places import Place

_END_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def require_trainable(base: BaseFolder, backend: str = "mistral-common") -> None:
    """Refuse a checkpoint that this project does not train.

    Args:
        base: The checkpoint.
        backend: The recipe's backend; a class without a Mistral tokenizer is trained only by `chat-template`.

    Raises:
        RecipeError: If the class of the checkpoint is not trained, or not by this backend.
        PinError: As for `BaseFolder.config` and `BaseFolder.weights`, or if this version of transformers does not have
            the class.
    """
    config, place = base.config, Place.of(base.config_file)
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
    _refuse_adapter(base)
    # a commit without fetched weights is judged by its configuration
    if sorted(base.path.glob("model*.safetensors")):
        _require_fit(base)
    else:
        quantization_facts(config, place)


def _refuse_adapter(base: BaseFolder) -> None:
    # transformers would load the base that this file names instead, and put an adapter on it that we never read
    if (file := base.path / "adapter_config.json").exists():
        found = "the folder of the base has an adapter, which transformers loads"
        raise PinError(found, place=str(file), expected="a base without adapter")


def _require_fit(base: BaseFolder) -> None:
    """Refuse weights with another size or fewer layers than the configuration declares; no weight is read."""
    stored = base.weights.infos
    model, found = base.empty_model(), ""
    if model.config.model_type == "ministral" and not model.config.sliding_window:
        found, expected = "no sliding_window, without which transformers does not compute this class", "a window"
    for name, parameter in () if found else model.named_parameters():
        # transformers may convert a name that layer 0 lacks as well
        if name not in stored and re.sub(r"\blayers\.\d+\.", "layers.0.", name) in stored:
            found, expected = f"{name} is not in the weights", "the number of layers of the weights"
        if name in stored and stored[name].shape != tuple(parameter.shape):
            found = f"{name} would have shape {tuple(parameter.shape)}"
            expected = f"{stored[name].shape}, as the weights"
    if found:
        raise PinError(found, place=str(base.config_file), expected=expected)


def load_base(base: BaseFolder, precision: Precision, device: str, *, packed: bool = False) -> Any:
    """Load the model of a checkpoint by its class, in eval mode, without a key-value cache by default.

    FP8 weights are dequantised to the requested dtype, on every device.

    Args:
        base: A checkpoint with safetensors weights.
        precision: The dtype of the weights in memory, for any dtype of the checkpoint.
        device: `cpu` or `cuda`.
        packed: Whether quantised weights stay quantised, as `transformers` loads them.

    Raises:
        PinError: As for `BaseFolder.architecture`, or if the files lack a weight, or have one that the model does not
            have.
    """
    # FP8 weights are dequantised in memory; any others go to the device one by one: eight processes of a machine would
    # else hold the base eight times
    is_placed = device != "cpu" and not isinstance(base.weights, DequantizedWeights)
    return _load(base, precision, packed=packed, **({"device_map": {"": device}} if is_placed else {})).to(device)


def load_nf4(base: BaseFolder, precision: Precision, device: str) -> Any:
    """Load a base like `load_base`, its linear layers except the head in 4 bits (NF4, double quantisation).

    Needs bitsandbytes. Norms, embeddings and head keep the requested precision: PEFT's own preparation would turn them
    into float32, and a large vocabulary would cost more than 4 bits save.

    Args:
        base: A checkpoint with safetensors weights.
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
    # placed during loading: some versions of transformers refuse `.to()` for a model in 4 bits
    return _load(base, precision, quantization_config=quantization, device_map={"": device})


def unquantized_share(model: Any) -> float | None:
    """Return the share of a base's values that 4 bits left in full, from 0 to 1; None if none are in 4 bits.

    bitsandbytes packs linear layers: embeddings and the head stay, and so do the experts of a mixture, which are
    tensors of three dimensions in transformers, and most of such a base.

    Args:
        model: The base, with or without an adapter, whose tensors are not counted.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    packed = [parameter.quant_state for parameter in frozen if getattr(parameter, "quant_state", None) is not None]
    full = sum(parameter.numel() for parameter in frozen if getattr(parameter, "quant_state", None) is None)
    in_four_bits = sum(math.prod(state.shape) for state in packed)
    return full / (full + in_four_bits) if packed else None


def _load(base: BaseFolder, precision: Precision, *, packed: bool = False, **options: Any) -> Any:
    from transformers import GenerationConfig

    architecture, dtype = base.architecture, torch_dtype(precision)
    _refuse_adapter(base)
    weights = base.stored_weights if packed else base.weights
    with base.making_model():
        model_class, config = architecture.model_class(), base.model_config()
        if is_fp8 := isinstance(weights, DequantizedWeights):
            # transformers keeps FP8 weights on some devices, and takes the size of a block from the shape of the
            # scales. Given full weights, it makes them the model's own without a copy
            for part in (config, config.get_text_config()):
                vars(part).pop("quantization_config", None)
            options["state_dict"] = {name: weights[name].to(dtype) for name in weights}
        elif not (base.path / GENERATION_CONFIG).is_file():
            # without that file, transformers reads the ids from config.json again
            options["generation_config"] = GenerationConfig(**_end_ids(base))
        with in_utf8(base.path) as named:
            model, report = model_class.from_pretrained(
                None if is_fp8 else named,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                **options,
            )
    # transformers only warns about a missing weight, and fills it with random numbers
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise PinError(f"{kind.replace('_', ' ')}: {', '.join(names[:5])}", place=str(base.path))
    model.config.name_or_path = model.name_or_path = str(base.path)
    # `generate` takes its defaults from here: penalties of the base would change greedy answers
    ids = {key: getattr(model.generation_config, key) for key in _END_IDS}
    model.generation_config = GenerationConfig(**ids)
    # Training has no use for a key-value cache, and gradient checkpointing cannot work with one. The balance of experts
    # is not part of our loss, and transformers' sum of it expects a padding mask, which a pack does not have.
    vars(model.config.get_text_config()).update(use_cache=False, output_router_logits=False)
    return model


def _end_ids(base: BaseFolder) -> dict[str, Any]:
    """Return the ids of BOS, EOS and padding in a configuration: of the whole model, or else of its text."""
    ids = {}
    for key in _END_IDS:
        value = base.config.get(key)
        ids[key] = base.facts.text.get(key) if value is None else value
    return ids
