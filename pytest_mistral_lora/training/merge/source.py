"""The input of a merge: an adapter that matches its manifest, and the base that it was trained on, in full weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading.jsonl import read_json
from pytest_mistral_lora.checkpoint.base_model import PRECISIONS, read_config, weight_files
from pytest_mistral_lora.checkpoint.weights import DTYPES, Weights
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_folder import require_adapter
from pytest_mistral_lora.records.hashing import ADAPTER_TENSORS, sha256_file
from pytest_mistral_lora.records.manifest import MANIFEST, load
from pytest_mistral_lora.records.verify.verify import verify
from pytest_mistral_lora.training.generate.compare import Adapted
from pytest_mistral_lora.training.merge.plan import CONFIG, INDEX

BASE_DTYPE = "base"
"""Value of `--dtype` for the dtype of the base's own weights."""

_NAMES = {code: name for name, code in DTYPES.items()}


@dataclass(frozen=True)
class MergeSource:
    """An adapter and its base, ready to be merged.

    Attributes:
        adapted: Both, ready to generate answers.
        manifest: The adapter's manifest.
        manifest_sha256: SHA-256 of its file.
        tensors: The adapter's tensors.
    """

    adapted: Adapted
    manifest: Mapping[str, Any]
    manifest_sha256: str
    tensors: Weights

    @classmethod
    def find(cls, adapter: Path, base: Path | None, *, device: str) -> MergeSource:
        """Find the base of an adapter's folder, and compare both with the adapter's manifest.

        Args:
            adapter: The adapter's folder.
            base: The base's folder; by default, the one that the adapter's folder records.
            device: `auto`, `cpu` or `cuda`.

        Raises:
            InputError: If the folder is no adapter, its manifest is missing, too old, or differs from it, or the base
                is not the one that the adapter was trained on.
        """
        require_adapter(adapter)
        manifest = _checked_manifest(adapter)
        adapted = Adapted.find(adapter, base, device=device)
        return cls(adapted, manifest, sha256_file(adapter / MANIFEST), Weights([adapter / ADAPTER_TENSORS]))

    @property
    def quantization(self) -> str | None:
        """`nf4` if the base was in 4 bits in training, else None."""
        return self.adapted.quantization

    def on(self, base: Path, dtype: str) -> Adapted:
        """Return the adapter on full weights of the base, in the precision of a merged dtype."""
        return replace(self.adapted, base=base, precision=PRECISIONS[dtype], quantization=None)


def _checked_manifest(adapter: Path) -> Mapping[str, Any]:
    file = adapter / MANIFEST
    if not file.is_file():
        raise InputError(
            f"no {MANIFEST}: nothing records the origin of the adapter, and a merged model could not record it either",
            place=str(adapter),
            expected="an adapter folder as mistral-lora train leaves it",
            next_step="PEFT's merge_and_unload merges it without a record.",
        )
    found = load(adapter)
    if found.version == 0:
        raise InputError(
            f"a manifest of version 0, which does not record {', '.join(found.not_recorded[:4])} and more",
            place=str(file),
            expected="a manifest as mistral-lora train writes it",
        )
    wrong = [fact for fact in verify(adapter) if fact.state == "mismatch" and not fact.is_unlisted]
    if wrong:
        raise InputError(
            f"{wrong[0].name} is {wrong[0].found}",
            place=str(wrong[0].place),
            expected=f"{wrong[0].recorded}, as recorded",
            next_step=f"The folder is not as it was saved: mistral-lora verify {adapter} lists the differences.",
        )
    return found.data


def require_full_weights(base: Path, weights: Weights) -> None:
    """Refuse a base that is quantised, or that transformers would not load as its files are.

    Raises:
        InputError: If a weight is not of full precision, if an adapter is in the base's folder, or if the index
            differs from the files.
    """
    refuse_quantized(base)
    packed = next((name for name, info in weights.infos.items() if info.dtype not in _NAMES), None)
    if packed is not None:
        raise InputError(
            f"{packed} is in {weights.infos[packed].dtype}",
            place=str(weights.infos[packed].file),
            expected=f"full weights: {', '.join(DTYPES)}",
        )
    if (base / CONFIG).is_file():
        raise InputError(
            "the base has an adapter in its folder, which transformers puts on it", place=str(base / CONFIG)
        )
    index = base / INDEX
    if len(weights.files) == 1 and not index.is_file():
        return
    # transformers loads by the index, and this module by the files: they must agree
    listed = read_json(index).get("weight_map")
    found = {name: info.file.name for name, info in weights.infos.items()}
    if listed != found:
        odd = sorted(dict(found.items() ^ (listed or {}).items()))[:1] or ["weight_map"]
        raise InputError(f"{odd[0]} is not where the index says", place=str(index), expected="an index of these files")


def refuse_quantized(base: Path) -> None:
    """Refuse a base with quantised weights, by its configuration.

    Raises:
        InputError: With the method of quantisation.
    """
    quantization = read_config(base).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"the base is quantised ({method}): an adapter cannot be added to packed weights",
            place=str(base / "config.json"),
            expected="full weights",
            next_step="Give the full base with --base, or merge into the dequantised weights: --dequantise.",
        )


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
    found = {_NAMES[info.dtype] for info in weights.infos.values()}
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
