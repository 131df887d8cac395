"""An adapter on its base: whether the two go together, and whether PEFT's model answers otherwise than the base."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.base_model import load_base, read_config, weight_files
from pytest_mistral_lora.conformance.adapter.config import lora_config
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import MistralLoraError, PinError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.hashing import read_tensors

PROBE_TOKENS = 32
SMALLEST = 1e-6
"""Smallest effect that counts, as a share of the largest logit: float32 has seven digits."""

_EMBEDDINGS = ("embed_tokens", "lm_head")


def fit_findings(folder: AdapterFolder, base: Path) -> Iterator[Finding]:
    """Yield the reasons, apart from shapes, for which an adapter must not be put on a base."""
    model = AdapterFolder(base)
    parent = model.valid_manifest.data.get("parent") if model.valid_manifest else None
    if parent is not None and parent["tensors_sha256"] == folder.tensors_sha256:
        yield Finding("ML419", "the base is merged with this adapter already", str(base), "the base before merging")
    elif model.config_file.is_file() and model.model_files:
        found = "the base has an adapter in its folder, which transformers puts on it when it loads it"
        yield Finding("ML419", found, str(model.config_file), "a base without adapter")
    if not read_config(base).get("tie_word_embeddings") or folder.config.get("ensure_weight_tying"):
        return
    # the base has one tensor for both: PEFT would change or save a copy of it, and the other would stay as it was
    for key in ("target_modules", "modules_to_save"):
        names = folder.config.get(key)
        touched = [name for name in _EMBEDDINGS if isinstance(names, list) and name in names]
        if touched:
            found = f"{key} has {' and '.join(touched)}, which the base keeps as one"
            yield Finding("ML420", found, str(folder.config_file), "neither, or ensure_weight_tying")


def memory_shortage(base: Path) -> str:
    """Return why a base is not loaded; empty if it fits into half of the free memory as float32."""
    try:
        size = 2 * sum(file.stat().st_size for file in weight_files(base))  # most bases are in two bytes a number
    except PinError as error:
        return str(error)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return "" if size < free // 2 else f"the base needs {size >> 30} GiB of memory, {free >> 30} GiB are free"


def effect_findings(folder: AdapterFolder, base: Path) -> Iterator[Finding]:
    """Yield a finding if PEFT leaves some of the tensors out, or the adapter changes no logit of its base.

    Raises:
        PinError: If the base does not load as it is.
    """
    from peft import PeftModel, get_peft_model_state_dict

    place = str(folder.tensors_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each of their subjects is a finding here, or nothing
        try:
            model = load_base(base, "fp32", "cpu")
        except MistralLoraError:
            raise
        except Exception as error:  # transformers and safetensors raise many types
            raise PinError(f"the base does not load: {error}", place=str(base)) from error
        try:
            config = lora_config(folder.config)
            adapted = PeftModel.from_pretrained(model, str(folder.path), config=config).eval()
        except Exception as error:  # PEFT raises many types, some of them far from the cause
            cause = " ".join(str(error).split())[:300]
            yield Finding("ML413", f"PEFT cannot put it on the base: {cause}", place, "an adapter of this base")
            return
        # PEFT warns of tensors that it does not find or does not know, and goes on with the initial values
        loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        saved = read_tensors(folder.tensors_file)
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
