"""The numbers of an adapter, tensor by tensor, and their effect on the base."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.reading import in_utf8
from pytest_mistral_lora.checkpoint.architectures import EMBEDDINGS
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.weights import Weights, weight_files
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import LibraryError, MemoryShortageError, PinError, and_more, one_line
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

if TYPE_CHECKING:
    import numpy as np

LARGEST = 1e3
"""Numbers of an adapter are small: far below 1, and a few at most with a high learning rate."""

TOWER = re.compile(r"(?:^|\.)(?:vision_tower|vision_model|vision_encoder|multi_modal_projector|audio_tower)\.")
"""Parts of a model that read images or sound."""

_TRAINED = ("F32", "BF16", "F16", "F64")
_TRAINED_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """A tensor in three values.

    Attributes:
        finite: Whether every number is finite.
        largest: The largest absolute value; 0.0 for a tensor of zeros.
        sha256: Hash of its bytes.
    """

    finite: bool
    largest: float
    sha256: str


def summarize_tensors(weights: Weights) -> dict[str, TensorSummary]:
    """Summarize every tensor of safetensors files, one at a time, so that memory does not grow with the file.

    Raises:
        InputError: If the file cannot be loaded.
    """
    import numpy as np

    # a file may have a hundred thousand of them, none with a byte
    empty = TensorSummary(True, 0.0, hashlib.sha256().hexdigest())
    found = {name: empty for name, info in weights.infos.items() if info.size == 0}
    with weights.held_open():
        for name in [name for name in weights if name not in found]:
            tensor = weights.array(name)
            digest = hashlib.sha256(tensor.tobytes()).hexdigest()
            if not is_floating(tensor):
                found[name] = TensorSummary(True, 1.0, digest)
                continue
            # a NaN among the numbers makes both ends NaN
            wide = tensor.astype(np.float32) if tensor.itemsize < 4 else tensor
            low, high = float(wide.min()), float(wide.max())
            found[name] = TensorSummary(math.isfinite(low) and math.isfinite(high), max(-low, high), digest)
    return found


def is_floating(tensor: np.ndarray[Any, Any]) -> bool:
    """Return whether an array holds floating-point numbers, including those of ml_dtypes."""
    return "float" in tensor.dtype.name


def finite_findings(folder: AdapterFolder, summaries: Mapping[str, TensorSummary]) -> Iterator[Finding]:
    """Yield tensors with NaN, infinity or too large a number, and dtypes that adapters are never trained in."""
    place = Place.of(folder.tensors_file)
    unusual = {name: item for name, item in summaries.items() if not item.finite or item.largest > LARGEST}
    for name, summary in sorted(unusual.items()):
        if not summary.finite:
            yield Finding("ML402", f"{name} is not finite", place, "finite numbers")
        else:
            found = f"{name} has a number of {summary.largest:.3g}"
            yield Finding("ML416", found, place, f"none above {LARGEST:g}")
    for name, dtype in sorted(
        (name, info.dtype) for name, info in folder.tensors.items() if info.dtype not in _TRAINED
    ):
        yield Finding("ML414", f"{name} is {dtype}", place, "F32, BF16 or F16")
    dtypes = sorted({info.dtype for info in folder.tensors.values() if info.dtype in _TRAINED})
    if len(dtypes) > 1 or dtypes == ["F64"]:
        yield Finding("ML415", f"tensors of {' and '.join(dtypes)}", place, "one dtype: F32, BF16 or F16")


def trained_findings(folder: AdapterFolder, summaries: Mapping[str, TensorSummary]) -> Iterator[Finding]:
    """Yield each LoRA tensor that is zero, and layers that share their numbers."""
    place = Place.of(folder.tensors_file)
    same: dict[str, list[str]] = defaultdict(list)
    tensors = folder.tensors
    trained = [name for name in summaries if tensors[name].size and any(side in name for side in _TRAINED_PARTS)]
    for name in sorted(trained):
        shape, summary = tensors[name].shape, summaries[name]
        if summary.largest == 0 and TOWER.search(name):
            continue  # rows without images cannot train it: the check `placement` reports that it is adapted
        if summary.largest == 0:
            yield Finding("ML403", f"{name} is zero: this layer learned nothing", place, "a trained layer")
        elif shape != (1, 1):  # two numbers can be equal by chance
            same[summary.sha256].append(name)
    for names in same.values():
        if len(names) > 1:
            found = f"{names[1]} is {names[0]} again{and_more(2, len(names))}"
            yield Finding("ML417", found, place, "numbers of its own for each layer")


PROBE_TOKENS = 32
SMALLEST = 1e-6
"""Smallest effect that counts, as a share of the largest logit: float32 has seven digits."""


def fit_findings(folder: AdapterFolder, base: BaseFolder, changed: Iterable[str]) -> Iterator[Finding]:
    """Yield the reasons, apart from shapes, why an adapter must not be used with a base.

    Args:
        folder: The adapter.
        base: Its base.
        changed: The names of the tensors that PEFT saves for this configuration.
    """
    model = folder.base_record
    parent = model.valid_manifest.data.get("parent") if model.valid_manifest else None
    if parent is not None and parent["tensors_sha256"] == folder.tensors_sha256:
        yield Finding(
            "ML419", "the base is merged with this adapter already", Place.of(base), "the base before merging"
        )
    elif model.config_file.is_file() and model.model_files:
        found = "the base has an adapter in its folder, which transformers puts on it when it loads it"
        yield Finding("ML419", found, Place.of(model.config_file), "a base without adapter")
    if base.is_tied and not folder.config.get("ensure_weight_tying"):
        yield from tied_findings(changed, Place.of(folder.config_file))


def tied_findings(changed: Iterable[str], place: Place) -> Iterator[Finding]:
    """Yield ML420 for each of the embeddings of a tied base that an adapter changes.

    The base has one tensor for both: PEFT would change or save a copy, and the original would not change.

    Args:
        changed: The names of the tensors that PEFT saves of the adapter.
        place: The place of the adapter's configuration.
    """
    names = [*changed]
    for key, part in (("target_modules", "lora_"), ("modules_to_save", "weight")):
        touched = [name for name in EMBEDDINGS if any(f".{name}.{part}" in changed_name for changed_name in names)]
        if touched:
            found = f"{key} has {' and '.join(touched)}, which the base keeps as one"
            yield Finding("ML420", found, place, "neither, or ensure_weight_tying")


def reason_not_to_load(base: BaseFolder) -> str:
    """Return why a base is not loaded: quantised, or too large for half of the memory; empty if it can be."""
    import psutil

    try:
        if base.facts.is_packed:
            return f"{base} is quantised: give the base in full precision"
        # as float32; most bases have two bytes a number
        size = (4 if base.facts.is_fp8 else 2) * sum(file.stat().st_size for file in weight_files(base.path))
    except PinError as error:
        return str(error)
    free = int(psutil.virtual_memory().available)
    return "" if size < free // 2 else f"the base needs {size >> 30} GiB of memory, {free >> 30} GiB are free"


def effect_findings(folder: AdapterFolder, base: BaseFolder) -> Iterator[Finding]:
    """Yield a finding if PEFT leaves some of the tensors out, or the adapter changes no logit of its base.

    Raises:
        PinError: If the base does not load.
    """
    from peft import PeftModel, get_peft_model_state_dict

    place = Place.of(folder.tensors_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each warning is a finding here, or irrelevant
        try:
            model = load_base(base, "fp32", "cpu")
        except (PinError, LibraryError, MemoryShortageError):
            raise
        except Exception as error:  # transformers and safetensors raise many types, and a damaged header raises ours
            raise PinError(f"the base does not load: {error}", place=str(base)) from error
        try:
            config = folder.lora_config([name for name, _ in model.named_modules()])
            with in_utf8(folder.path) as named:
                adapted = PeftModel.from_pretrained(model, str(named), config=config).eval()
        except Exception as error:  # PEFT raises many types, some far from the cause
            yield Finding(
                "ML413", f"PEFT cannot put it on the base: {one_line(error)}", place, "an adapter of this base"
            )
            return
        # PEFT only warns about missing or unknown tensors, and keeps the initial values
        loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        saved = folder.load_tensors()
        for name in sorted(saved.keys() & loaded.keys()):
            if not (saved[name].float() == loaded[name].float()).all():
                found = f"{name} is not what PEFT has after loading"
                yield Finding("ML413", found, place, "the tensor of the file")
        effect, largest = adapter_effect(adapted)
        if not effect > SMALLEST * largest:
            found = f"the adapter changes no logit by more than {effect:.3g}, of {largest:.3g}"
            yield Finding("ML413", found, place, "other logits than the base's")


def adapter_effect(adapted: Any) -> tuple[float, float]:
    """Return the largest change that an adapter makes to a logit, and the largest logit, on a fixed run of ids."""
    import torch

    rows = adapted.get_input_embeddings().weight.shape[0]
    ids = torch.arange(PROBE_TOKENS).remainder(rows)[None]
    with torch.inference_mode():
        changed = adapted(input_ids=ids, use_cache=False).logits
        with adapted.disable_adapter():
            plain = adapted(input_ids=ids, use_cache=False).logits
    return (changed - plain).abs().max().item(), plain.abs().max().item()
