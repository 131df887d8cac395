"""The weights, sizes and adapter tensors in a GGUF file, compared with the folder that it was converted from.

Of ggml-org/llama.cpp, conversion/llama.py has the fields and the order of rows, convert_lora_to_gguf.py the adapter's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.model_facts import (
    contradictions,
    facts_of_config,
    facts_of_gguf,
    facts_of_params,
    read_params,
)
from pytest_mistral_lora.checkpoint.tokenizer_folder import PARAMS
from pytest_mistral_lora.checkpoint.weights import Weights, interleaved
from pytest_mistral_lora.conformance.adapter.layout import PREFIX, adapter_layout
from pytest_mistral_lora.conformance.finding import Finding, first_findings
from pytest_mistral_lora.errors import InputError, shortened
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

if TYPE_CHECKING:
    import numpy as np

    from pytest_mistral_lora.records.gguf_file import GgufFile

_SHOWN = 5
_ARCHITECTURES = ("llama", "mistral3")
"""Architectures whose q and k rows the converter interleaves, as the rotary embedding of readers takes them."""

_ROUNDING = {"F32": 1e-6, "F16": 2e-3, "BF16": 8e-3, "Q8": 2e-2, "Q6": 5e-2, "Q5": 0.1, "Q4": 0.2, "IQ4": 0.2}
_ROUNDING |= {"MXFP4": 0.25, "Q3": 0.35, "IQ3": 0.4, "Q2": 0.6, "IQ2": 0.7, "TQ": 0.9, "IQ1": 0.9}
"""Largest error of a tensor by its type, as a part of its norm: about three times what a normal distribution gives.
Another tensor, or rows in another order, are 1.4 away."""

_HEAD, _EMBEDDINGS = "output.weight", "token_embd.weight"
_HALF = 0.5
"""If less than half of a merged change is in the file, it was not merged, or not by this adapter."""


def architecture_findings(file: GgufFile, model: BaseFolder) -> Iterator[Finding]:
    """Yield ML917 for each size and setting that differs from a checkpoint's `config.json`, or else `params.json`.

    Raises:
        InputError: If the file of the checkpoint cannot be read.
    """
    own, source = facts_of_gguf(file.fields, file.architecture), model.config_file
    if not source.is_file() and (model.path / PARAMS).is_file():
        source = model.path / PARAMS
        stated = facts_of_params(read_params(source))
    else:
        stated = facts_of_config(model.config)
    for found, expected in contradictions(own, stated):
        yield Finding("ML917", found.as_found, Place.of(file.path), expected.as_expected(str(source)))


class ComparedWeights:
    """The tensors of a GGUF file, compared with those of a checkpoint folder.

    Attributes:
        file: The GGUF file.
        model: The folder of the converted checkpoint: a base, or a merged model.
        text: A line for the summary: the tensors, and the largest error by type.
    """

    def __init__(self, file: GgufFile, model: BaseFolder, base: BaseFolder | None) -> None:
        """Read the headers.

        Args:
            file: The GGUF file.
            model: The converted checkpoint.
            base: The base of a merged model; None to compare only with the model.

        Raises:
            InputError: If the architecture is unknown, or a file cannot be read.
        """
        self.file: GgufFile = file
        self.model: BaseFolder = model
        self._to_gguf = _name_map(file)
        key = f"{file.architecture}.attention.head_count"
        heads = file.fields.get(key)
        self._heads = {".attn_q.": heads, ".attn_k.": file.fields.get(f"{key}_kv", heads)}
        self.text = ""
        self._own = model.file_weights
        same = base is None or base.path.resolve() == model.path.resolve()
        self._base = None if same or base is None else base.file_weights

    def findings(self) -> Iterator[Finding]:
        """Yield ML916 for each missing or surplus tensor, and for each difference that its type does not explain."""
        place, found, worst = Place.of(self.file.path), [], dict[str, float]()
        names = self._names()
        for name in sorted(names.keys() - self.file.tensors.keys()):
            found.append(Finding("ML916", f"{name} is missing", place, f"{names[name]} of {self.model}"))
        for name in sorted(self.file.tensors.keys() - names.keys()):
            if not name.startswith("rope_"):
                found.append(Finding("ML916", f"{name} is not in {self.model}", place))
        inner = square = 0.0
        for name in sorted(names.keys() & self.file.tensors.keys()):
            tensor, expected = self.file.tensors[name], self._own.infos[names[name]].shape
            if tensor.shape != expected:
                found.append(Finding("ML916", f"{name} has shape {tensor.shape}", place, str(expected)))
                continue
            want, have = self._stored(self._own, name, names[name]), self.file.values(name)
            error = _relative(have - want, want)
            kind = self.file.kind_of(name)
            worst[kind] = max(worst.get(kind, 0.0), error)
            bound = _largest_error(kind)
            if not error <= bound:
                text = f"{name} differs from {names[name]} by {error:.2g} of its norm"
                found.append(Finding("ML916", text, place, f"at most {bound:g} for {kind}"))
            part = self._merged_part(name, names[name], want, have)
            inner, square = inner + part[0], square + part[1]
        self.text = ", ".join(f"{kind} to {error:.2g}" for kind, error in sorted(worst.items()))
        if square and inner / square < _HALF and not found:
            text = f"{inner / square:.2f} of the change from the base to {self.model} is in the file"
            found.append(Finding("ML916", text, place, "1: convert the merged model, and not its base"))
        yield from first_findings(found, _SHOWN, place)

    def _names(self) -> dict[str, str]:
        """Return the name in the folder of each tensor of the text model, by its name in the GGUF file.

        Raises:
            InputError: If the library knows no name for a tensor.
        """
        import numpy as np

        names: dict[str, str] = {}
        for name in self._own:
            plain = name.removeprefix("model.language_model.").removeprefix("language_model.").removeprefix("model.")
            if plain.startswith(("vision_tower.", "multi_modal_projector.")):
                continue  # the vision part is in another file
            plain = plain if plain.startswith("lm_head.") else f"model.{plain}"
            found = self._to_gguf.get_name(plain, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise InputError(f"{name} has no name in a GGUF file", place=str(self.model))
            names[found] = name
        # without a head, readers use the embeddings: right for a tied head, which may be in either file
        if _EMBEDDINGS in names and _HEAD in self.file.tensors:
            names.setdefault(_HEAD, names[_EMBEDDINGS])
        elif {_HEAD, _EMBEDDINGS} <= names.keys() and np.array_equal(
            self._own.array(names[_HEAD]), self._own.array(names[_EMBEDDINGS])
        ):
            del names[_HEAD]
        return names

    def _stored(self, weights: Weights, name: str, merged_name: str) -> np.ndarray[Any, Any]:
        """Return a tensor of a folder in the form of the file: in float32, rows in the file's order."""
        values: np.ndarray[Any, Any] = weights.array(merged_name).astype("float32")
        heads = next((count for part, count in self._heads.items() if part in name), None)
        return values if heads is None else interleaved(values, heads, name)

    def _merged_part(self, name: str, merged_name: str, want: Any, have: Any) -> tuple[float, float]:
        """Return the inner product of G - B and M - B, and the square of M - B.

        Their quotient is the share of the merged change in the file. G is the file's tensor, M the merged one and
        B the base's. Errors of the quantisation are as often up as down, and cancel in the sum, even if each is larger
        than the change.
        """
        if (
            self._base is None
            or merged_name not in self._base
            or self._base.infos[merged_name].shape != self._own.infos[merged_name].shape
        ):
            return 0.0, 0.0
        before = self._stored(self._base, name, merged_name)
        change = want - before
        return float(((have - before) * change).sum(dtype="float64")), float((change**2).sum(dtype="float64"))


def _name_map(file: GgufFile) -> Any:
    """Return the package's map from the names of transformers to those of the file's architecture.

    Raises:
        InputError: If the architecture is unknown.
    """
    import gguf

    if file.architecture not in _ARCHITECTURES:
        known = " or ".join(_ARCHITECTURES)
        raise InputError(f"the architecture is {shortened(file.architecture)}", place=str(file.path), expected=known)
    architecture = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    # an adapter has no layer count
    layers = file.fields.get(f"{file.architecture}.block_count")
    return gguf.get_tensor_name_map(architecture, min(layers, 1000) if type(layers) is int else 1000)


def _largest_error(kind: str) -> float:
    return next((limit for start, limit in _ROUNDING.items() if kind.startswith(start)), 0.9)


def _relative(difference: Any, values: Any) -> float:
    norm = math.sqrt(float((values**2).sum(dtype="float64")))
    apart = math.sqrt(float((difference**2).sum(dtype="float64")))
    return apart / norm if norm else apart


def adapter_findings(file: GgufFile, folder: AdapterFolder) -> Iterator[Finding]:
    """Yield ML914 for each missing, surplus or different tensor of an adapter, and for a different scale.

    Raises:
        InputError: If a file of the adapter cannot be read.
    """
    place, weights = Place.of(file.path), folder.weights
    layout = adapter_layout(folder, folder.located_base.folder)
    if layout.refusal:
        raise InputError(f"PEFT refuses the adapter: {layout.refusal}", place=str(folder.path))
    names = dict(_adapter_names(file, weights))
    found = [
        Finding("ML914", f"{name} is missing", place, f"{names[name]} of {folder.path}")
        for name in sorted(names.keys() - file.tensors.keys())
    ]
    extra = sorted(file.tensors.keys() - names.keys())
    found += [Finding("ML914", f"{name} is not in {folder.path}", place) for name in extra]
    alpha = file.fields.get("adapter.lora.alpha")
    for name in sorted(names.keys() & file.tensors.keys()):
        found += _adapter_tensor_findings(file, name, weights.array(names[name]).astype("float32"), folder)
        layer = names[name].removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if name.endswith(".lora_a") and layer in layout.scalings:
            # readers scale B A by alpha / rank, and have no other rule
            rank, scale = file.tensors[name].shape[0], layout.scalings[layer]
            if not isinstance(alpha, float) or not math.isclose(alpha / rank, scale, rel_tol=1e-5):
                shown = "is missing" if alpha is None else f"is {shortened(alpha)}"
                shown = f"{alpha:g} makes a scale of {alpha / rank:g}" if isinstance(alpha, float) else shown
                text = f"adapter.lora.alpha {shown} for {layer}"
                found.append(Finding("ML914", text, place, f"{scale:g}, the scale of training"))
    yield from first_findings(found, _SHOWN, place)


def _adapter_names(file: GgufFile, weights: Weights) -> Iterator[tuple[str, str]]:
    """Yield the name in the GGUF file and in the safetensors file of each tensor of an adapter."""
    to_gguf = _name_map(file)
    for name in weights:
        layer, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        side = part.partition(".")[0].lower()
        plain = layer.replace("model.language_model.", "model.")
        found = to_gguf.get_name(f"{plain}.weight", try_suffixes=(".weight",)) if side in ("a", "b") else None
        # the format has no place for some tensors, such as a trained embedding or a magnitude
        yield (f"{found}.lora_{side}" if found else name), name


def _adapter_tensor_findings(file: GgufFile, name: str, want: Any, folder: AdapterFolder) -> Iterator[Finding]:
    if name.endswith(".lora_b") and (".attn_q." in name or ".attn_k." in name):
        facts = folder.located_base.require(folder.path).facts
        want = interleaved(want, facts.kv_heads if ".attn_k." in name else facts.heads, name)
    if file.tensors[name].shape != want.shape:
        yield Finding("ML914", f"{name} has shape {file.tensors[name].shape}", Place.of(file.path), str(want.shape))
        return
    error, kind = _relative(file.values(name) - want, want), file.kind_of(name)
    bound = _largest_error(kind)
    if not error <= bound:
        text = f"{name} differs from the safetensors file by {error:.2g} of its norm"
        yield Finding("ML914", text, Place.of(file.path), f"at most {bound:g} for {kind}")
