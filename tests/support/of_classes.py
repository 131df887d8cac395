"""Adapters as PEFT writes them, on tiny bases of each class."""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

COMMIT = "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db"
_IMAGES = re.compile("vision_tower|multi_modal_projector")


@dataclass(frozen=True)
class MadeAdapter:
    """A base and an adapter of it; tests that change them copy them first."""

    base: Path
    adapter: Path
    merged: Path


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="of-classes-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def architecture(name: str) -> Architecture:
    """Return an architecture by the type of its text model, with `wrapped-` before it in a model of images."""
    return Architecture(TEXT_MODELS[name.removeprefix("wrapped-")], is_wrapped=name.startswith("wrapped-"))


def tiny_base(name: str, *, tied: bool = False) -> Path:
    """Return a tiny base of a class, made once."""
    folder = _folder() / f"{name}{'-tied' * tied}"
    return (
        folder
        if folder.is_dir()
        else write_tiny_base(folder, shipped_tokenizer("spm-v3"), architecture=architecture(name), tied=tied)
    )


@functools.cache
def made_adapter(
    name: str, targets: str | tuple[str, ...], *, parameters: tuple[str, ...] = (), seen_images: bool = False
) -> MadeAdapter:
    """Return an adapter of the class with that name, as rows of text would train it, and what PEFT merges.

    Args:
        name: As for `architecture`.
        targets: PEFT's `target_modules`.
        parameters: PEFT's `target_parameters`.
        seen_images: Whether the layers that read images moved, too.
    """
    base = tiny_base(name)
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    modules: Any = targets if isinstance(targets, str) else list(targets)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=modules, target_parameters=list(parameters) or None)
    random = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = architecture(name).model_class().from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(model, settings)
        for parameter_name, parameter in adapted.named_parameters():
            if ".lora_B" in parameter_name and (seen_images or not _IMAGES.search(parameter_name)):
                parameter.data.normal_(std=0.02, generator=random)
        adapted.save_pretrained(folder / "lora")
        adapted.merge_and_unload().save_pretrained(folder / "merged")
    file = folder / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": COMMIT}))
    return MadeAdapter(base, folder / "lora", folder / "merged")
