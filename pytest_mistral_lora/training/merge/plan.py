"""What becomes of each tensor of the base: PEFT, on a model without weights, says which layers the adapter is on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners import lora
from peft.utils import ModulesToSaveWrapper
from tqdm import tqdm

from pytest_mistral_lora.chat.reading.jsonl import read_json
from pytest_mistral_lora.checkpoint.base_model import empty_model, read_config
from pytest_mistral_lora.checkpoint.weights import Weights, write_safetensors
from pytest_mistral_lora.errors import InputError, MergeError
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.hashing import ADAPTER_TENSORS
from pytest_mistral_lora.training.adapter import EMBEDDINGS, PREFIX, peft_quiet

CONFIG = "adapter_config.json"
_NAME = "default"
_PLAIN_STARTS = (True, False, None, "gaussian")
"""Initial values that leave the base's weights alone; PiSSA, OLoRA and others take their part out of them."""


@dataclass(frozen=True)
class LowRank:
    """A layer's weight W becomes W + scaling · B A, and of DoRA its rows get the learned lengths.

    Attributes:
        a: Name of A, `(rank, inputs)`.
        b: Name of B, `(outputs, rank)`.
        scaling: What B A is multiplied by: alpha / rank, or alpha / √rank (rsLoRA).
        magnitude: Name of the lengths, `(outputs,)`; None without DoRA.
    """

    a: str
    b: str
    scaling: float
    magnitude: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapter's tensors that it takes."""
        return (self.a, self.b, *([self.magnitude] if self.magnitude else []))

    def shape(self, adapter: Weights) -> tuple[int, ...]:
        """Return the shape of the weight that it fits."""
        return adapter.infos[self.b].shape[0], adapter.infos[self.a].shape[1]

    def apply(self, weight: torch.Tensor, adapter: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the merged weight, float32, in PEFT's order of operations."""
        change = adapter[self.b].float() @ adapter[self.a].float() * self.scaling
        merged = weight.float() + change
        if self.magnitude is not None:
            merged *= (adapter[self.magnitude].float() / torch.linalg.norm(merged, dim=1))[:, None]
        return merged


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained in full takes the base's place.

    Attributes:
        name: Its name in the adapter.
    """

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """The adapter's tensors that it takes."""
        return (self.name,)

    def shape(self, adapter: Weights) -> tuple[int, ...]:
        """Return the shape of the tensor that it fits."""
        return adapter.infos[self.name].shape

    def apply(self, weight: torch.Tensor, adapter: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the trained tensor, float32."""
        return adapter[self.name].float()


Change: TypeAlias = LowRank | Replacement


def plan(folder: Path, adapter: Weights, base_folder: Path, base: Weights) -> dict[str, Change]:
    """Return the change of each tensor of the base that changes, by its name.

    Args:
        folder: The adapter's folder.
        adapter: The adapter's tensors.
        base_folder: The base's folder.
        base: The base's tensors.

    Raises:
        InputError: If a tensor of the adapter has no place, one is missing, or one does not fit; if the adapter is of
            a kind that has no sum with the base; if it changes one of two tensors that the base keeps as one.
    """
    config = _config(folder)
    model = _without_weights(base_folder, config, folder)
    changes = dict(_changes(model, folder))
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    taken = {name for change in changes.values() for name in change.names}
    odd = sorted((expected.keys() ^ adapter.keys()) | (expected.keys() - taken))
    if odd:
        missing = odd[0] not in adapter
        raise InputError(
            f"{odd[0]} {'is missing' if missing else 'has no place in a merged model'}"
            + (f", and {len(odd) - 1} more" if len(odd) > 1 else ""),
            place=str(folder / ADAPTER_TENSORS),
            expected=f"the {len(taken)} tensors that {CONFIG} speaks of",
        )
    for name, tensor in expected.items():
        if tuple(tensor.shape) != adapter.infos[name].shape:
            raise InputError(
                f"{name} has shape {adapter.infos[name].shape}",
                place=str(folder / ADAPTER_TENSORS),
                expected=f"{tuple(tensor.shape)}, of this base and the rank in {CONFIG}",
            )
    for name, change in changes.items():
        _check_fit(name, change, folder, adapter, base_folder, base)
    return changes


def _config(folder: Path) -> Any:
    place = str(folder / CONFIG)
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"not PEFT's: {error}", place=place, expected="the configuration of a LoRA adapter") from error
    if config.bias != "none":
        raise InputError(f"bias is {config.bias!r}", place=place, expected="none: Mistral's layers have no bias")
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise InputError(
            f"init_lora_weights is {config.init_lora_weights!r}, which changed the base's own weights before training",
            place=place,
            expected="an adapter of the base as it is",
            next_step="Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…).",
        )
    config.inference_mode = True
    return config


def _without_weights(base: Path, config: Any, folder: Path) -> Any:
    try:
        with torch.device("meta"), peft_quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is an error here, or nothing
            return get_peft_model(empty_model(base), config)
    except Exception as error:  # PEFT raises many types
        cause = " ".join(str(error).split())[:300]
        raise InputError(f"PEFT refuses it on this base: {cause}", place=str(folder / CONFIG)) from error


def _changes(model: Any, folder: Path) -> Iterator[tuple[str, Change]]:
    for path, module in model.named_modules():
        layer = path.removeprefix(PREFIX)
        if isinstance(module, ModulesToSaveWrapper):
            for name, _ in module.modules_to_save[_NAME].named_parameters():
                yield f"{layer}.{name}", Replacement(f"{path}.{name}")
        elif isinstance(module, lora.LoraLayer):
            yield f"{layer}.weight", _low_rank(path, module, folder)


def _low_rank(path: str, module: Any, folder: Path) -> LowRank:
    variant = module.lora_variant.get(_NAME)
    dora = type(variant).__name__.startswith("Dora")
    if type(module) is not lora.Linear or module.fan_in_fan_out or not (variant is None or dora):
        kind = type(module if variant is None else variant).__name__
        raise InputError(
            f"the adapter on {path.removeprefix(PREFIX)} is PEFT's {kind}",
            place=str(folder / CONFIG),
            expected="LoRA, rsLoRA or DoRA on linear layers: of others, no sum with the base is known here",
        )
    magnitude = f"{path}.lora_magnitude_vector" if dora else None
    return LowRank(f"{path}.lora_A.weight", f"{path}.lora_B.weight", float(module.scaling[_NAME]), magnitude)


def _check_fit(
    name: str, change: Change, folder: Path, adapter: Weights, base_folder: Path, base: Weights
) -> None:  # fmt: skip
    place = str(folder / ADAPTER_TENSORS)
    shared = [one for one in EMBEDDINGS if f".{name}".endswith(f".{one}.weight")]
    if shared and read_config(base_folder).get("tie_word_embeddings"):
        raise InputError(
            f"{change.names[0]} changes {shared[0]}, which this base keeps as one with the other of "
            f"{' and '.join(EMBEDDINGS)}",
            place=place,
            expected="an adapter that changes neither: merged, they would be two",
            next_step="Use base and adapter as they are, or untie the base's embeddings and train on that.",
        )
    if name not in base:
        raise InputError(f"{change.names[0]} changes {name}", place=place, expected=f"a tensor of {base_folder}")
    if change.shape(adapter) != base.infos[name].shape:
        raise InputError(
            f"{change.names[0]} is for a weight of shape {change.shape(adapter)}",
            place=place,
            expected=f"{base.infos[name].shape}, as {name} of {base_folder}",
        )


INDEX = "model.safetensors.index.json"


def written_size(base: Weights, dtype: str) -> int:
    """Return how many bytes the merged tensors have."""
    return sum(math.prod(info.shape) for info in base.infos.values()) * int(getattr(torch, dtype).itemsize)


def write_weights(
    folder: Path, base: Weights, adapter: Weights, changes: Mapping[str, Change], dtype: str, *, progress: bool = False
) -> None:
    """Write the base's files again with the changes, and its index.

    In memory are, at any time, one tensor of the base and of the adapter what changes it, in float32.

    Args:
        folder: Where the files go, under the base's names.
        base: The base's tensors.
        adapter: The adapter's tensors.
        changes: What `plan` returned.
        dtype: dtype of all tensors in the files.
        progress: Whether to show a bar on stderr.

    Raises:
        MergeError: If a tensor is not finite in `dtype`.
    """
    with tqdm(total=len(base), unit="tensor", desc="merging", disable=not progress) as bar:

        def merged(name: str) -> torch.Tensor:
            bar.update()
            change = changes.get(name)
            tensor = base[name] if change is None else change.apply(base[name], adapter)
            return _finite(name, tensor.to(getattr(torch, dtype)), tensor)

        for file in base.files:
            shapes = {name: base.infos[name].shape for name in base.names_in(file)}
            bar.set_postfix_str(file.name)
            write_safetensors(folder / file.name, shapes, dtype, merged)
    _write_index(folder, base, dtype)


def _finite(name: str, written: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    if torch.isfinite(written).all():
        return written
    largest = exact.abs().max().item()
    raise MergeError(
        f"{name} is not finite in {written.dtype}: its largest number is {largest:g}",
        expected="finite numbers",
        next_step="Nothing is written. Check the adapter, or merge with --dtype bfloat16 or float32.",
    )


def _write_index(folder: Path, base: Weights, dtype: str) -> None:
    index = base.files[0].with_name(INDEX)
    if not index.is_file():
        return
    data = read_json(index)
    metadata = {**data.get("metadata", {}), "total_size": written_size(base, dtype)}
    write_json(folder / INDEX, {**data, "metadata": metadata})
