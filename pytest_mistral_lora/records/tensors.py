"""The tensors of an adapter or a merged model: read, hashed, and compared with those of another run."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_mistral_lora.chat.reading import in_utf8
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import canonical_json, framed, inside

if TYPE_CHECKING:
    import numpy as np
    import torch

ADAPTER_TENSORS = "adapter_model.safetensors"
"""The file of an adapter's tensors, as PEFT names it."""


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name, on the CPU; its header has been checked.

    Raises:
        InputError: If it is not the file that was checked, or has a dtype that torch cannot load.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with in_utf8(file) as named:
            tensors: dict[str, torch.Tensor] = load_file(named)
    except (OSError, SafetensorError, RuntimeError, TypeError, KeyError) as error:
        raise InputError(f"not a safetensors file: {error}", place=str(file)) from error
    return tensors


def sha256_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of named tensors: name, dtype, shape and little-endian bytes, in name order.

    Unlike the hash of a safetensors file, it does not depend on the file's header or metadata.
    """
    import torch

    stored = ((name, tensors[name].detach().cpu().contiguous()) for name in sorted(tensors))
    return _sha256(
        (
            name,
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in stored
    )


def sha256_of_weights(weights: Weights) -> str:
    """Return the same hash for the tensors of safetensors files, read one at a time and without torch.

    Raises:
        InputError: As for `TensorInfo.dtype_name`.
    """
    infos = sorted(weights.infos.items())
    with weights.held_open():
        return _sha256((name, info.dtype_name, info.shape, weights.read_bytes(name)) for name, info in infos)


_Described: TypeAlias = tuple[str, str, tuple[int, ...], bytes]
"""Name, dtype, shape and bytes of a tensor."""


def _sha256(tensors: Iterable[_Described]) -> str:
    digest = hashlib.sha256()
    for name, dtype, shape, content in tensors:
        digest.update(framed(canonical_json({"name": name, "dtype": dtype, "shape": list(shape)})))
        digest.update(framed(content))
    return digest.hexdigest()


@dataclass(slots=True)
class TensorKindDiff:
    """The difference of tensors of one kind, over all layers: `self_attn.q_proj.lora_A`.

    Attributes:
        name: The tensors' name without layer, prefix and `.weight`.
        tensors: Number of tensors that both have in the same shape.
        different: Number of these that differ in dtype or in any bit.
        max_abs: Largest absolute difference of two values.
    """

    name: str
    tensors: int = 0
    different: int = 0
    max_abs: float = 0.0
    _sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("aa", "bb", "ab", "dd"), 0.0))

    @property
    def relative(self) -> float:
        """Norm of the difference, divided by the norm of the first; infinite if only the latter is zero."""
        # ||b - a|| / ||a||, from sums of squares over all tensors of the kind, in float64
        apart = math.sqrt(self._sums["dd"])
        if self._sums["aa"]:
            return apart / math.sqrt(self._sums["aa"])
        return math.inf if apart else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two, from -1 to 1; not a number if one of them is zero."""
        # <a, b> / (||a|| ||b||), clipped: rounding can leave it outside of [-1, 1]
        norms = math.sqrt(self._sums["aa"]) * math.sqrt(self._sums["bb"])
        return max(-1.0, min(1.0, self._sums["ab"] / norms)) if norms else math.nan

    def add(self, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
        """Add a pair of tensors of one shape."""
        import numpy as np

        self.tensors += 1
        # bytes, not values: nan differs from itself, and -0 equals 0
        self.different += a.dtype != b.dtype or a.tobytes() != b.tobytes()
        with np.errstate(all="ignore"):  # a hostile file, or a run that diverged
            # for complex numbers, which no adapter has, compare the real and the imaginary parts
            kind = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
            first, second = (tensor.astype(kind).ravel().view(np.float64) for tensor in (a, b))
            apart = second - first
            # Python's max() would ignore nan
            largest = float(np.abs(apart).max(initial=0.0))
            self.max_abs = largest if math.isnan(largest) or largest > self.max_abs else self.max_abs
            for name, value in (("aa", first @ first), ("bb", second @ second), ("ab", first @ second)):
                self._sums[name] += float(value)
            self._sums["dd"] += float(apart @ apart)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON data; null for a number that is not finite."""
        values = {name: getattr(self, name) for name in ("max_abs", "relative", "cosine")}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return {"kind": self.name, "tensors": self.tensors, "different": self.different, **finite}


@dataclass(frozen=True, slots=True)
class TensorsDiff:
    """The difference of two sets of tensors.

    Attributes:
        kinds: The tensors that both have in the same shape, by kind.
        reshaped: Name, and both shapes, of tensors that both have in different shapes.
        only_a: Names of tensors that only the first has.
        only_b: Names of tensors that only the second has.
    """

    kinds: tuple[TensorKindDiff, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def compared(self) -> int:
        """Number of tensors that both have in the same shape."""
        return sum(kind.tensors for kind in self.kinds)

    @property
    def different(self) -> int:
        """Number of these that differ."""
        return sum(kind.different for kind in self.kinds)

    @property
    def equal(self) -> bool:
        """Whether both have the same tensors, bit for bit."""
        return not (self.different or self.reshaped or self.only_a or self.only_b)


def tensor_files(folder: Path) -> list[Path]:
    """Return the safetensors files of an adapter's or a merged model's folder; empty if there are none.

    Raises:
        InputError: If a link leaves the folder.
    """
    is_adapter = (folder / ADAPTER_TENSORS).is_file()
    found = [folder / ADAPTER_TENSORS] if is_adapter else sorted(folder.glob("model*.safetensors"))
    return [inside(folder, file.name) for file in found]


def diff_tensors(a: Path, b: Path) -> TensorsDiff:
    """Compare the tensors of two folders by name.

    Raises:
        InputError: As for `Weights` and `TensorInfo.dtype_name`.
    """
    kinds: dict[str, TensorKindDiff] = {}
    reshaped = []
    first, second = Weights(tensor_files(a)), Weights(tensor_files(b))
    for name in sorted(first.keys() & second.keys()):
        shapes = first.infos[name].shape, second.infos[name].shape
        if shapes[0] != shapes[1]:
            reshaped.append((name, *shapes))
            continue
        # "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight" is of the kind "self_attn.q_proj.lora_A".
        kind = re.sub(r"^(?:base_model\.model\.)?(?:.*\.layers\.\d+\.)?|\.weight$", "", name)
        kinds.setdefault(kind, TensorKindDiff(kind)).add(first.array(name), second.array(name))
    only_a, only_b = sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())
    return TensorsDiff(tuple(kinds.values()), tuple(reshaped), tuple(only_a), tuple(only_b))


def decoder_indices(names: Iterable[str]) -> list[int]:
    """Return the index of each decoder layer in which a layer has LoRA's matrix A, sorted."""
    found = (re.search(r"\.layers\.(\d+)\.", name) for name in adapted_modules(names))
    return sorted({int(match[1]) for match in found if match})


def adapted_modules(names: Iterable[str]) -> list[str]:
    """Return the dotted name of each layer that has LoRA's matrix A among the tensors of an adapter, sorted."""
    layers = (name.partition(".lora_A.")[0] for name in names if ".lora_A." in name)
    return sorted(layer.removeprefix("base_model.model.") for layer in layers)
