"""The parts of a merge, checked before the work: the adapter and its base, full weights, and the dtype to write."""

from __future__ import annotations

import shlex
from pathlib import Path

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.base_model import base_weights, read_config, weight_files
from pytest_mistral_lora.checkpoint.fp8 import declared_quantization, is_fp8
from pytest_mistral_lora.checkpoint.weights import DTYPES, Weights
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_config import CONFIG
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import require_folder
from pytest_mistral_lora.records.manifest import MANIFEST
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.generate.model_spec import ModelSpec
from pytest_mistral_lora.training.merge.plan import INDEX

BASE_DTYPE = "base"
"""Value of `--dtype` for the dtype of the base's own weights."""

_DTYPE_NAMES = {code: name for name, code in DTYPES.items()}


def merge_source(adapter: Path, base: Path | None, *, device: str) -> ModelSpec:
    """Return an adapter and its base, after both are compared with the adapter's manifest.

    Args:
        adapter: The adapter's folder.
        base: The base's folder; by default, the one that the adapter's folder records.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: If the folder is no adapter, its manifest is missing, too old, or differs from it, or the base
            is not the one that the adapter was trained on.
    """
    require_folder(adapter)
    folder = AdapterFolder(adapter, base, may_fetch=True)
    folder.require_adapter()
    if folder.manifest is None:
        raise InputError(
            f"no {MANIFEST}: nothing records the origin of the adapter, and a merged model could not record it either",
            place=str(adapter),
            expected="an adapter folder as mistral-lora train leaves it",
            next_step="PEFT's merge_and_unload merges it without a record.",
        )
    if folder.manifest.version == 0:
        missing = ", ".join(folder.manifest.not_recorded[:4])
        raise InputError(
            f"a manifest of version 0, which does not record {missing} and more",
            place=str(folder.manifest_file),
            expected="a manifest as mistral-lora train writes it",
        )
    # files that are not listed do no harm: a merge does not copy them
    wrong = [field for field in verify(folder) if field.state == "mismatch" and not field.is_unlisted]
    if wrong:
        raise InputError(
            f"{wrong[0].name} is {wrong[0].found}",
            place=str(wrong[0].place),
            expected=f"{wrong[0].recorded}, as recorded",
            next_step="The folder is not as it was saved: "
            f"mistral-lora verify {shlex.quote(str(adapter))} lists the differences.",
        )
    return ModelSpec.of(folder, device=device)


def refuse_quantized(base: Path) -> None:
    """Refuse a base with quantised weights other than FP8, by its configuration.

    Raises:
        InputError: With the method of quantisation.
    """
    quantization = declared_quantization(config := read_config(base))
    if quantization and not is_fp8(config):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"the base is quantised ({method}): an adapter cannot be added to packed weights",
            place=str(base / "config.json"),
            expected="full weights",
            next_step="Give the full base with --base, or merge into the dequantised weights: --dequantise.",
        )


def require_full_weights(base: Path) -> Weights:
    """Return a base's tensors in full precision, those in FP8 dequantised.

    Raises:
        PinError: As for `base_weights`.
        InputError: If an adapter is in the base's folder, or if the index differs from the files.
    """
    refuse_quantized(base)
    weights = base_weights(base)
    packed = next((name for name, info in weights.infos.items() if info.dtype not in _DTYPE_NAMES), None)
    if packed is not None:
        info = weights.infos[packed]
        raise InputError(f"{packed} is in {info.dtype}", place=str(info.file), expected=f"one of {', '.join(DTYPES)}")
    if (base / CONFIG).is_file():
        raise InputError(
            "the base has an adapter in its folder, which transformers puts on it", place=str(base / CONFIG)
        )
    index = base / INDEX
    if len(weights.files) == 1 and not index.is_file():
        return weights
    # transformers loads by the index, and this module by the files: they must agree
    listed = read_json(index).get("weight_map")
    found = {name: info.file.name for name, info in weights.stored.infos.items()}
    if listed != found:
        odd = sorted(dict(found.items() ^ (listed or {}).items()))[:1] or ["weight_map"]
        raise InputError(f"{odd[0]} is not where the index says", place=str(index), expected="an index of these files")
    return weights


def merge_dtype(base: Path, weights: Weights, asked: str) -> str:
    """Return the dtype to write: the one asked for, or that of the base's weights.

    Args:
        base: The base's folder.
        weights: Its tensors.
        asked: A name of `DTYPES`, or `base`.

    Raises:
        InputError: If there is no such dtype, or the base's weights have several and its configuration names none.
    """
    if asked in DTYPES:
        return asked
    if asked != BASE_DTYPE:
        raise InputError(f"{asked!r}", place="--dtype", expected=f"{BASE_DTYPE} or one of {', '.join(DTYPES)}")
    found = {_DTYPE_NAMES[info.dtype] for info in weights.infos.values()}
    if len(found) == 1:
        return found.pop()
    config = read_config(base)
    named = str(config.get("dtype") or config.get("torch_dtype"))
    if named not in found:
        raise InputError(
            f"the base's weights are in {' and '.join(sorted(found))}",
            place=str(weights.files[0].parent),
            next_step="Choose with --dtype.",
        )
    return named


def weights_of(base: Path) -> Weights:
    """Return the tensors of a base's folder.

    Raises:
        PinError: If there are none.
        InputError: If a file is no safetensors file.
    """
    return Weights(weight_files(base))
