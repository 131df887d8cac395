"""The base of an adapter: where it is, whether it is the one, and what an adapter must not do to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.conformance.adapter.config import lora_config
from pytest_mistral_lora.conformance.adapter.files import CONFIG, Opened, model_files
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import MistralLoraError, PinError

_EMBEDDINGS = ("embed_tokens", "lm_head")


def valid_manifest(folder: Path) -> Mapping[str, Any] | None:
    """Return the manifest of a folder under today's names; None if there is none, or none that is valid."""
    from pytest_mistral_lora.records.adapter_folder import AdapterFolder

    found = AdapterFolder(folder).valid_manifest
    return None if found is None else found.data


def fit_findings(opened: Opened, base: Path) -> Iterator[Finding]:
    """Yield what makes an adapter and a base not go together, beside shapes."""
    yield from _merged_findings(opened, base)
    yield from _tied_findings(opened, base)


def _merged_findings(opened: Opened, base: Path) -> Iterator[Finding]:
    """Yield a base that is a merged model: of this adapter, it would be applied twice."""
    parent = (valid_manifest(base) or {}).get("parent")
    own = (valid_manifest(opened.folder) or {}).get("lora", {}).get("tensors_sha256") or _tensors_sha256(opened)
    if parent is not None and parent["tensors_sha256"] == own:
        yield Finding("ML419", "the base is merged with this adapter already", str(base), "the base before merging")
    elif (base / CONFIG).is_file() and model_files(base):
        found = "the base has an adapter in its folder, which transformers puts on it when it loads it"
        yield Finding("ML419", found, str(base / CONFIG), "a base without adapter")


def _tensors_sha256(opened: Opened) -> str:
    from pytest_mistral_lora.records.hashing import read_tensors, sha256_tensors

    return sha256_tensors(read_tensors(Path(opened.place)))


def _tied_findings(opened: Opened, base: Path) -> Iterator[Finding]:
    from pytest_mistral_lora.checkpoint.base_model import read_config

    config = opened.config or {}
    if not read_config(base).get("tie_word_embeddings") or config.get("ensure_weight_tying"):
        return
    for key in ("target_modules", "modules_to_save"):
        names = config.get(key)
        touched = [name for name in _EMBEDDINGS if isinstance(names, list) and name in names]
        if touched:
            found = f"{key} has {' and '.join(touched)}, which the base keeps as one"
            yield Finding("ML420", found, opened.config_place, "neither, or ensure_weight_tying")


def enough_memory(base: Path) -> str:
    """Return why a base is not loaded; empty where it fits into a part of the free memory as float32."""
    import os

    from pytest_mistral_lora.checkpoint.base_model import weight_files

    try:
        size = 2 * sum(file.stat().st_size for file in weight_files(base))
    except PinError as error:
        return str(error)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return "" if size < free // 2 else f"the base needs {size >> 30} GiB of memory, {free >> 30} GiB are free"


PROBE_TOKENS = 32
SMALLEST = 1e-6
"""Smallest effect that counts, as a share of the largest logit: float32 has seven digits."""


def effect_findings(opened: Opened, base: Path) -> Iterator[Finding]:
    """Yield whether an adapter changes no logit of its base, or PEFT leaves some of its tensors out.

    Raises:
        PinError: If the base does not load as it is.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they warn of is a finding here, or nothing
        yield from _effect_findings(opened, base)


def _effect_findings(opened: Opened, base: Path) -> Iterator[Finding]:
    model = _loaded(base)
    try:
        adapted = _adapted(model, opened)
    except Exception as error:  # PEFT raises many types, some of them far from the cause
        cause = " ".join(str(error).split())[:300]
        yield Finding("ML413", f"PEFT cannot put it on the base: {cause}", opened.place, "an adapter of this base")
        return
    yield from _left_out(adapted, opened)
    effect, largest = effect_of(adapted)
    if not effect > SMALLEST * largest:
        found = f"the adapter changes no logit by more than {effect:.3g}, of {largest:.3g}"
        yield Finding("ML413", found, opened.place, "other logits than the base's")


def _loaded(base: Path) -> Any:
    from pytest_mistral_lora.checkpoint.base_model import load_base

    try:
        return load_base(base, "fp32", "cpu")
    except MistralLoraError:
        raise
    except Exception as error:  # transformers and safetensors raise many types
        raise PinError(f"the base does not load: {error}", place=str(base)) from error


def _adapted(model: Any, opened: Opened) -> Any:
    from peft import PeftModel

    config = lora_config(opened.config or {})
    return PeftModel.from_pretrained(model, str(opened.folder), config=config).eval()


def _left_out(adapted: Any, opened: Opened) -> Iterator[Finding]:
    from peft import get_peft_model_state_dict

    from pytest_mistral_lora.records.hashing import read_tensors

    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    saved = read_tensors(Path(opened.place))
    for name in sorted(saved.keys() & loaded.keys()):
        if not (saved[name].float() == loaded[name].float()).all():
            yield Finding("ML413", f"{name} is not what PEFT has after loading", opened.place, "the tensor of the file")


def effect_of(adapted: Any) -> tuple[float, float]:
    """Return the largest change that an adapter makes to a logit, and the largest logit, on a fixed run of ids."""
    import torch

    rows = adapted.get_input_embeddings().weight.shape[0]
    ids = torch.arange(PROBE_TOKENS).remainder(rows)[None]
    with torch.inference_mode():
        changed = adapted(input_ids=ids, use_cache=False).logits
        with adapted.disable_adapter():
            plain = adapted(input_ids=ids, use_cache=False).logits
    return (changed - plain).abs().max().item(), plain.abs().max().item()
