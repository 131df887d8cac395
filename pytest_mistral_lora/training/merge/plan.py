"""The change of each tensor of the base, by PEFT on a model without weights; and the merged weights, streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import get_peft_model_state_dict
from peft.tuners import lora
from peft.utils import ModulesToSaveWrapper

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.architectures import EMBEDDINGS, spelled_name
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.weights import INDEX, Weights, write_safetensors
from pytest_mistral_lora.errors import InputError, MergeError, and_more
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_config import CONFIG
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.training.adapter import PREFIX, recorded_without_weights
from pytest_mistral_lora.training.display import RunDisplay

_NAME = "default"


@dataclass(frozen=True)
class LowRankChange:
    """A layer's weight W becomes W + scaling · B A; with DoRA, its rows then get the learned norms.

    Attributes:
        a: Name of A, `(rank, inputs)`.
        b: Name of B, `(outputs, rank)`.
        scaling: Factor of B A: alpha / rank, or alpha / √rank (rsLoRA).
        magnitude: Name of DoRA's learned row norms m, `(outputs,)`; None without DoRA.
    """

    a: str
    b: str
    scaling: float
    magnitude: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapter's tensors that it uses."""
        return (self.a, self.b, *([self.magnitude] if self.magnitude else []))

    def shape(self, adapter: Weights) -> tuple[int, ...]:
        """Return the shape of the weight that it fits."""
        return adapter.infos[self.b].shape[0], adapter.infos[self.a].shape[1]

    def apply(self, weight: torch.Tensor, adapter: Mapping[str, torch.Tensor], rows: slice) -> torch.Tensor:
        """Return rows of the merged weight, float64."""
        # LoRA: W' = W + s B A. DoRA (arXiv:2402.09353): with V = W + s B A, row i of W' is m_i V_i / ||V_i||.
        a, b = adapter[self.a].double(), adapter[self.b][rows].double()
        merged = torch.addmm(weight[rows].double(), b, a, alpha=self.scaling)
        if self.magnitude is not None:
            merged *= (adapter[self.magnitude][rows].double() / torch.linalg.norm(merged, dim=1))[:, None]
        return merged


@dataclass(frozen=True)
class FullChange:
    """A tensor that was trained in full replaces the base's.

    Attributes:
        name: Its name in the adapter.
    """

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """The adapter's tensors that it uses."""
        return (self.name,)

    def shape(self, adapter: Weights) -> tuple[int, ...]:
        """Return the shape of the tensor that it fits."""
        return adapter.infos[self.name].shape

    def apply(self, weight: torch.Tensor, adapter: Mapping[str, torch.Tensor], rows: slice) -> torch.Tensor:
        """Return rows of the trained tensor, float64."""
        return adapter[self.name][rows].double()


TensorChange: TypeAlias = LowRankChange | FullChange


def plan_merge(adapter: AdapterFolder, base: BaseFolder) -> dict[str, TensorChange]:
    """Return the change of each tensor of the base that changes, by its name.

    Raises:
        InputError: If a tensor of the adapter has no place in the base, is missing, or does not fit; if an adapter of
            this kind cannot be added to the base; if it changes one of two tensors that the base ties.
        PinError: As for `BaseFolder.weights` and `BaseFolder.empty_model`.
    """
    tensors, place = adapter.weights, Place.of(adapter.tensors_file)
    model = recorded_without_weights(adapter, base)
    # in a wrapper, tensors have other names on disk than in memory
    on_disk = {spelled_name(name, base.weights): name for name in base.weights}
    memory = dict(model.named_parameters())
    changes = {on_disk.get(spelled_name(name, memory), name): change for name, change in _changes(model, adapter)}
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    used = {name for change in changes.values() for name in change.names}
    # an expected tensor that no change uses is as bad as a missing one: a part of the adapter would be lost
    odd = sorted((expected.keys() ^ tensors.keys()) | (expected.keys() - used))
    if odd:
        missing = odd[0] not in tensors
        raise InputError(
            f"{odd[0]} {'is missing' if missing else 'has no place in a merged model'}" + and_more(1, len(odd)),
            place=place,
            expected=f"the {len(used)} tensors that {CONFIG} describes",
        )
    for name, tensor in expected.items():
        if tuple(tensor.shape) != tensors.infos[name].shape:
            raise InputError(
                f"{name} has shape {tensors.infos[name].shape}",
                place=place,
                expected=f"{tuple(tensor.shape)}, of this base and the rank in {CONFIG}",
            )
    for name, change in changes.items():
        _check_fit(name, change, adapter, base)
    return changes


def _changes(model: Any, adapter: AdapterFolder) -> Iterator[tuple[str, TensorChange]]:
    for path, module in model.named_modules():
        layer = path.removeprefix(PREFIX)
        if isinstance(module, ModulesToSaveWrapper):
            for name, _ in module.modules_to_save[_NAME].named_parameters():
                yield f"{layer}.{name}", FullChange(f"{path}.{name}")
        elif isinstance(module, lora.LoraLayer):
            variant = module.lora_variant.get(_NAME)
            dora = type(variant).__name__.startswith("Dora")
            # an exact type: subclasses of PEFT's Linear and other variants compute something else in forward
            if type(module) is not lora.Linear or module.fan_in_fan_out or not (variant is None or dora):
                kind = type(module if variant is None else variant).__name__
                raise InputError(
                    f"the adapter on {layer} is PEFT's {kind}",
                    place=str(adapter.config_file),
                    expected="LoRA, rsLoRA or DoRA on linear layers: of others, no sum with the base is known here",
                )
            names = (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
            magnitude = f"{path}.lora_magnitude_vector" if dora else None
            yield f"{layer}.weight", LowRankChange(*names, float(module.scaling[_NAME]), magnitude)


def _check_fit(name: str, change: TensorChange, adapter: AdapterFolder, base: BaseFolder) -> None:
    place, weights = Place.of(adapter.tensors_file), base.weights
    shared = [part for part in EMBEDDINGS if f".{name}".endswith(f".{part}.weight")]
    if shared and base.is_tied:
        raise InputError(
            f"{change.names[0]} changes {shared[0]}, which this base keeps as one with the other of "
            f"{' and '.join(EMBEDDINGS)}",
            place=place,
            expected="an adapter that changes neither: merged, they would be two",
            next_step="Use base and adapter as they are, or untie the base's embeddings and train on that.",
        )
    if name not in weights:
        raise InputError(f"{change.names[0]} changes {name}", place=place, expected=f"a tensor of {base}")
    shape = change.shape(adapter.weights)
    if shape != weights.infos[name].shape:
        raise InputError(
            f"{change.names[0]} is for a weight of shape {shape}",
            place=place,
            expected=f"{weights.infos[name].shape}, as {name} of {base}",
        )


_BLOCK = 2**19
"""Numbers that are summed at once: 4 MiB in float64."""


def written_size(base: Weights, dtype: str) -> int:
    """Return the size of the merged tensors, in bytes."""
    return sum(math.prod(info.shape) for info in base.infos.values()) * int(getattr(torch, dtype).itemsize)


def _rounded(
    weight: torch.Tensor, change: TensorChange | None, adapter: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """Return a tensor as it is written, each number rounded once."""
    if change is None:
        return weight.to(dtype)
    written = torch.empty(weight.shape, dtype=dtype)
    step = max(1, _BLOCK * len(weight) // max(1, weight.numel()))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        written[rows] = change.apply(weight, adapter, rows)
    return written


def write_weights(
    folder: Path,
    base: Weights,
    adapter: Weights,
    changes: Mapping[str, TensorChange],
    dtype: str,
    display: RunDisplay | None = None,
) -> None:
    """Write the base's files again with the changes, and its index.

    At any time, memory holds one tensor of the base, its merged copy, and some of its rows in float64: a sum in float32
    would be rounded twice, and be off by many units in the last place where base and change nearly cancel.

    Args:
        folder: Folder of the new files, which have the base's names.
        base: The base's tensors.
        adapter: The adapter's tensors.
        changes: The result of `plan_merge`.
        dtype: dtype of all tensors in the files.
        display: Display of the progress; None to show nothing.

    Raises:
        MergeError: If a tensor is not finite in `dtype`.
    """
    shown, numbers = display or RunDisplay(), count(1)

    def merged(name: str) -> torch.Tensor:
        change, weight = changes.get(name), base[name]
        written = _rounded(weight, change, adapter, getattr(torch, dtype))
        # float16 ends at 65504: a larger weight becomes infinite without an error
        if not torch.isfinite(written).all():
            exact = weight if change is None else change.apply(weight, adapter, slice(None))
            raise MergeError(
                f"{name} is not finite in {written.dtype}: its largest number is {exact.abs().max().item():g}",
                expected="finite numbers",
                next_step="Nothing is written. Check the adapter, or merge with --dtype bfloat16 or float32.",
            )
        shown.count(next(numbers), len(base), "tensor")
        return written

    for file in base.files:
        shapes = {name: info.shape for name, info in base.infos.items() if info.file == file}
        if shapes:  # a file may have held nothing but scales of FP8 weights
            write_safetensors(folder / file.name, shapes, dtype, merged)
    index = base.files[0].with_name(INDEX)
    if index.is_file():
        data = read_json(index)
        metadata = {**data.get("metadata", {}), "total_size": written_size(base, dtype)}
        # of an FP8 base, the merged weights have no scales
        places = {name: file for name, file in data.get("weight_map", {}).items() if name in base}
        write_json(folder / INDEX, {**data, "metadata": metadata, "weight_map": places})
