"""Does an adapter do anything? It is put on its base by PEFT, and the logits are compared."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_mistral_lora.conformance.adapter.config import lora_config
from pytest_mistral_lora.conformance.adapter.files import Opened
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.errors import MistralLoraError, PinError

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
    from pytest_mistral_lora.checkpoint.base import load_base

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

    from pytest_mistral_lora.records.identity import read_tensors

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
