"""The folders of a merge: the adapter and its base, checked before the work, and the files beside the merged weights.

transformers, servers and the converters to GGUF read the same model from those files.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN, oracle_file
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.fp8 import DequantizedWeights, without_quantization
from pytest_mistral_lora.checkpoint.model_facts import TIE, ModelFacts
from pytest_mistral_lora.checkpoint.pins import TEXT_FILES
from pytest_mistral_lora.checkpoint.tokenizer_folder import SPM_MODEL, TOKENIZER_CONFIG
from pytest_mistral_lora.checkpoint.tokenizers import TOKENIZER_JSON, convert
from pytest_mistral_lora.checkpoint.weights import DTYPES, INDEX, Weights
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_config import CONFIG
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import require_folder, write_json, write_text
from pytest_mistral_lora.records.manifest import MANIFEST
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.generate.model_spec import ModelSpec

BASE_DTYPE = "base"
"""Value of `--dtype` for the dtype of the base's own weights."""

_DTYPE_NAMES = {code: name for name, code in DTYPES.items()}


def merge_source(adapter: Path, base: BaseFolder | None, *, device: str) -> ModelSpec:
    """Return an adapter and its base, after both are compared with the adapter's manifest.

    Args:
        adapter: The adapter's folder.
        base: The base; by default, the one that the adapter's folder records.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: If the folder is not an adapter; if its manifest is missing, too old, or differs from it; or if the
            adapter was trained on another base.
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
    # unlisted files do no harm: a merge does not copy them
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


def refuse_quantized(base: BaseFolder) -> None:
    """Refuse a base with quantised weights other than FP8, by its configuration.

    Raises:
        InputError: With the method of quantisation.
    """
    quantization = base.facts.quantization
    if base.facts.is_packed:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"the base is quantised ({method}): an adapter cannot be added to packed weights",
            place=str(base.config_file),
            expected="full weights",
            next_step="Give the full base with --base, or merge into the dequantised weights: --dequantise.",
        )


def require_full_weights(base: BaseFolder) -> Weights:
    """Return a base's tensors in full precision, those in FP8 dequantised.

    Raises:
        PinError: As for `BaseFolder.weights`.
        InputError: If an adapter is in the base's folder, or if the index differs from the files.
    """
    refuse_quantized(base)
    weights = base.weights
    packed = next((name for name, info in weights.infos.items() if info.dtype not in _DTYPE_NAMES), None)
    if packed is not None:
        info = weights.infos[packed]
        raise InputError(f"{packed} is in {info.dtype}", place=str(info.file), expected=f"one of {', '.join(DTYPES)}")
    if (adapter_config := base.path / CONFIG).is_file():
        found = "the base has an adapter in its folder, which transformers puts on it"
        raise InputError(found, place=str(adapter_config))
    index = base.path / INDEX
    if len(weights.files) == 1 and not index.is_file():
        return weights
    # transformers loads by the index, and this module by the files: they must agree
    listed = base.index
    stored = weights.stored if isinstance(weights, DequantizedWeights) else weights
    places = {name: info.file.name for name, info in stored.infos.items()}
    if listed != places:
        odd = sorted(dict(places.items() ^ listed.items()))[:1]
        raise InputError(f"{odd[0]} is not where the index says", place=str(index), expected="an index of these files")
    return weights


def merge_dtype(base: BaseFolder, weights: Weights, dtype: str) -> str:
    """Return the dtype to write: the chosen one, or the dtype of the base's weights.

    Args:
        base: The base.
        weights: Its tensors.
        dtype: A name of `DTYPES`, or `base`.

    Raises:
        InputError: If the dtype is unknown, or the base's weights have several and its configuration names none of
            them.
    """
    if dtype in DTYPES:
        return dtype
    if dtype != BASE_DTYPE:
        raise InputError(f"{dtype!r}", place="--dtype", expected=f"{BASE_DTYPE} or one of {', '.join(DTYPES)}")
    found = {_DTYPE_NAMES[info.dtype] for info in weights.infos.values()}
    if len(found) == 1:
        return found.pop()
    named = base.facts.dtype
    if named not in found:
        raise InputError(
            f"the base's weights are in {' and '.join(sorted(found))}",
            place=str(weights.files[0].parent),
            next_step="Choose with --dtype.",
        )
    return named


_KEPT = ("*_config.json", "chat_template.json", "SYSTEM_PROMPT.txt")
_NOT_KEPT = ("tokenizer_config.json", "adapter_config.json", "*quant*")
"""Files of the base beside its weights that a merged model keeps, and those that it writes itself."""


def write_companions(folder: Path, weights: Weights, spec: ModelSpec, dtype: str) -> None:
    """Write the files that a model needs beside its weights: the base's configuration, and the adapter's tokenizer.

    Args:
        folder: The merged folder.
        weights: The tensors that were written there.
        spec: Adapter and base.
        dtype: The dtype of the written tensors.
    """
    adapter, base = spec.folder.path, spec.base.path
    config = with_ties(without_quantization(spec.base.config), weights)
    # transformers 4 named it torch_dtype, and its older versions read nothing else
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    for name, part in config.items():
        if isinstance(part, dict):
            config[name] = {**part, **{key: dtype for key in ("torch_dtype", "dtype") if part.get(key)}}
    write_json(folder / "config.json", {**config, key: dtype})
    # image processor, generation settings and system prompt are copied unchanged; the adapter's tokenizer files follow
    kept = (file for pattern in _KEPT for file in sorted(base.glob(pattern)) if file.is_file())
    listed = (
        name
        for name in spec.folder.require_manifest().data["files"]
        if any(fnmatch(name, pattern) for pattern in TEXT_FILES)
    )
    inherited = (file for file in kept if not any(fnmatch(file.name, pattern) for pattern in _NOT_KEPT))
    for file in (*inherited, *(adapter / name for name in listed)):
        shutil.copyfile(file, folder / file.name)
    tokenizer, plain = oracle_file(folder), base / SPM_MODEL
    if tokenizer is not None and tokenizer.name == TEKKEN:
        if not (folder / TOKENIZER_JSON).exists():
            # a converter to GGUF would read tekken.json itself, and write the name of a template for the template
            _write_tokenizer_json(folder, tokenizer)
    elif tokenizer is not None:
        _write_sentencepiece_companions(folder, tokenizer)
    elif plain.is_file() and (folder / TOKENIZER_CONFIG).is_file():
        _write_sentencepiece_companions(folder, plain)


def with_ties(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Return a configuration whose flags about tied embeddings are true to the weights, at every level."""
    # a server may drop the head of a file whose configuration has a tie at any level (vllm-project/vllm#51063)
    facts = ModelFacts(config)
    heads = [name for name in weights if name.endswith("lm_head.weight")]
    embeddings = [name for name in weights if name.endswith("embed_tokens.weight")]
    equal = bool(heads and embeddings) and torch.equal(weights[heads[0]], weights[embeddings[0]])
    tied = not heads or (any(facts.ties.values()) and equal)
    nested = {"text_config": {**facts.text, TIE: tied}} if facts.is_wrapped else {}
    return {**config, **nested, TIE: tied}


def _write_sentencepiece_companions(folder: Path, tokenizer: Path) -> None:
    """Write the two files that a converter to GGUF needs to keep the ids of a SentencePiece tokenizer.

    Without `tokenizer.model` it takes a vocabulary without scores; without a value of `add_prefix_space` the GGUF file
    adds a space after every control token. It warns about neither.
    """
    plain, config = folder / SPM_MODEL, folder / TOKENIZER_CONFIG
    if not plain.exists():
        shutil.copyfile(tokenizer, plain)
    if not config.is_file():
        # with `tokenizer.model` alone, transformers would build a tokenizer of its own, by the rules of its version
        _write_tokenizer_json(folder, tokenizer)
    data = read_json(config)
    if data.get("add_prefix_space") is None:
        write_json(config, {**data, "add_prefix_space": False})


def _write_tokenizer_json(folder: Path, tokenizer: Path) -> None:
    """Write the tokenizer files of transformers that the folder lacks."""
    fast = convert(Oracle(tokenizer))
    if not (folder / TOKENIZER_JSON).exists():
        write_text(folder / TOKENIZER_JSON, fast.backend_tokenizer.to_str(pretty=True) + "\n")
    if not (folder / TOKENIZER_CONFIG).exists():
        data = {f"{name}_token": getattr(fast, f"{name}_token") for name in ("bos", "eos", "unk")}
        # a class that transformers 4 and 5 both have
        data |= {"clean_up_tokenization_spaces": False, "legacy": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(folder / TOKENIZER_CONFIG, data)
