"""Which layers a recipe adapts, on a tiny model of its base's class, and what `mistral-lora check` says of the adapter.

The adapter is PEFT's, made and saved with the recipe's own target. Nothing is trained: `lora_B` is random, but zero on
the model of images if the recipe trains on text alone, as rows of text give it no gradient.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from boards.inputs import derived_tekken

from pytest_mistral_lora import judge
from pytest_mistral_lora.checkpoint.architectures import EMBEDDINGS
from pytest_mistral_lora.checkpoint.tiny_model import TinyKind, write_tiny_base

_OTHER = {"voxtral": "VoxtralForConditionalGeneration", "pixtral": "LlavaForConditionalGeneration"}
"""Classes that this package does not train, for which the names of their layers are judged alone."""
_OF_LAYERS = ("ML409", "ML420", "ML450", "ML451", "ML452", "ML453", "ML454")
_WORDS = 300


@dataclass(frozen=True)
class Target:
    """What a recipe adapts, in the words of PEFT.

    Attributes:
        modules: Last or full names of modules, a pattern of full names, or `all-linear`.
        exclude: Wildcards of full names; every other linear layer is chosen (NeMo).
        patterns: Wildcards of full names, of which each chooses linear layers (NeMo).
        every_linear: Whether every linear layer is chosen, the head among them (NeMo).
        by_name: Whether the names of all linear layers but the head are added (Axolotl's `lora_target_linear`).
        of_text: Whether modules outside the text model are left out (Unsloth).
    """

    modules: tuple[str, ...] | str = ()
    exclude: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    every_linear: bool = False
    by_name: bool = False
    of_text: bool = False


@dataclass(frozen=True)
class Adapted:
    """The layers that a target adapts, and the findings on them.

    Attributes:
        kinds: The last names of the adapted layers of the text model, in order.
        elsewhere: How many adapted layers are in each other part of the model.
        findings: Rule, severity and words of each finding.
    """

    kinds: tuple[str, ...] = ()
    elsewhere: dict[str, int] = field(default_factory=dict)
    findings: tuple[tuple[str, str, str], ...] = ()


@functools.cache
def adapted(label: str, target: Target, has_images: bool) -> Adapted:
    """Return what a target adapts in a class.

    Args:
        label: The label of a `TinyKind`, or a key of `_OTHER`.
        target: The target.
        has_images: Whether the recipe's rows have images or sounds.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    base = _base(label)
    model = _model(label, base)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=_modules(model, target),
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT says of a recipe is no verdict
            peft = get_peft_model(model, config)
    except ValueError as error:
        return Adapted(findings=(("ML409", "error", f"PEFT refuses: {str(error).partition('. ')[0]}"),))
    names = [name for name, module in peft.named_modules() if hasattr(module, "lora_A")]
    text = [name for name in names if ".layers." in name and _part(name) == "text"]
    parts = [_part(name) for name in names if name not in text]
    elsewhere = {part: parts.count(part) for part in dict.fromkeys(parts)}
    kinds = tuple(dict.fromkeys(name.partition(".layers.")[2].partition(".")[2] for name in text))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_B." in name and (has_images or _part(name) in ("text", "lm_head")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "adapter"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.save_pretrained(place, save_embedding_layers=False)
        verdict = judge(place, base=None if label in _OTHER else base)
    found = tuple(
        (finding.rule, str(finding.severity), str(finding.found))
        for finding in verdict.findings
        if finding.rule in _OF_LAYERS
    )
    return Adapted(kinds, elsewhere, found)


def _part(name: str) -> str:
    for part in ("vision_tower", "audio_tower", "multi_modal_projector", *EMBEDDINGS):
        if f".{part}." in f".{name}.":
            return part
    return "text"


def _modules(model: Any, target: Target) -> list[str] | str:
    """Return PEFT's `target_modules` for a target."""
    import torch

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if target.every_linear:
        return linear
    if target.patterns:
        return [name for name in linear if any(_is_wildcard_match(pattern, name) for pattern in target.patterns)]
    if target.exclude:
        return [name for name in linear if not any(_is_wildcard_match(pattern, name) for pattern in target.exclude)]
    if target.by_name:
        named = [name.rpartition(".")[2] for name in linear]
        return sorted({*target.modules, *named} - {"lm_head"})
    if target.of_text:
        wanted = target.modules
        return [name for name in linear if name.rpartition(".")[2] in wanted and _part(name) == "text"]
    return target.modules if isinstance(target.modules, str) else list(target.modules)


def _is_wildcard_match(pattern: str, name: str) -> bool:
    """Report whether a wildcard chooses a name: NeMo AutoModel's `*` stands for any text, dots among it."""
    return fnmatchcase(name, pattern)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="recipes-of-trainers-")


@functools.cache
def _base(label: str) -> Path:
    """Return the folder of a tiny checkpoint of a class."""
    folder = Path(_folder().name)
    place = folder / label
    if label not in _OTHER:
        kind = TinyKind.labelled(label)
        tokenizer = derived_tekken().write_derived("derived-v13", folder, words=_WORDS)
        write_tiny_base(place, tokenizer, architecture=kind.architecture, tied=kind.tied)
    return place


def _model(label: str, base: Path) -> Any:
    import transformers

    if label not in _OTHER:
        return TinyKind.labelled(label).architecture.model_class().from_pretrained(base)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 16}
    if label == "voxtral":
        audio = {**sizes, "num_mel_bins": 8, "max_source_positions": 8}
        config = transformers.VoxtralConfig(text_config=text, audio_config=audio)
        return transformers.VoxtralForConditionalGeneration(config)
    vision = transformers.PixtralVisionConfig(**sizes, head_dim=16, image_size=28, patch_size=14)
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.MistralConfig(**text))
    return transformers.LlavaForConditionalGeneration(config)


def title_of(label: str) -> str:
    """Return the class of a label, for the page."""
    return _OTHER[label] if label in _OTHER else TinyKind.labelled(label).architecture.title


def described(found: Adapted) -> str:
    """Return the adapted layers, as the page shows them."""
    also = ", ".join(f"{count} in `{part}`" for part, count in found.elsewhere.items())
    return "; ".join(filter(None, (", ".join(_short(found.kinds)), also)))


def _short(kinds: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(kind.removeprefix("self_attn.").removeprefix("mlp.") for kind in kinds))
