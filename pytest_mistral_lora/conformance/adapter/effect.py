"""The size of each layer's change, compared with its neighbours and with the base's own weights."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.adapter.layout import PREFIX, AdapterLayout
from pytest_mistral_lora.conformance.adapter.weights import LARGEST, is_floating
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import MistralLoraError, short_json
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_config import PLAIN_STARTS
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

if TYPE_CHECKING:
    import numpy as np

LEAST_OF_NEIGHBOURS = 0.01
"""Adam moves every layer by about the same: in a trained adapter, the layers of a kind differ by a factor of ten."""

LEAST_OF_ALL = 0.001
"""Blocks far from each other, and kinds of layers (q_proj, down_proj, ...), differ more, by widths and gradients."""

_NEIGHBOURS = 4
_A, _B = ".lora_A.weight", ".lora_B.weight"
_BLOCK = re.compile(r"^(?P<before>.*\blayers)\.(?P<block>\d{1,6})\.(?P<kind>.+)$")
_ONE_PROJECTION = re.compile(r"\.(?:[qkvo]|gate|up|down)_proj$")
"""Layers of one projection: of a fused one, such as gate_up_proj, a part can be left alone on purpose."""
_SHARDS = 8
"""Most processes among which a lost shard is looked for."""


def movement_findings(folder: AdapterFolder) -> Iterator[Finding]:
    """Yield each layer, each kind of layers, and each shard of a kind, that hardly moved compared with the others.

    If all layers are equally small, the run was short: no finding. Experts are left out: some are hardly ever used.

    Raises:
        InputError: As for `AdapterFolder.weights`.
    """
    weights, place = folder.weights, Place.of(folder.tensors_file)
    kinds: dict[str, dict[int, float]] = defaultdict(dict)
    lost: dict[str, set[str]] = defaultdict(set)
    for name in weights:
        layer = name.removesuffix(_A)
        match = _BLOCK.match(layer)
        if layer == name or layer + _B not in weights or match is None or "expert" in layer:
            continue
        pair = weights.array(name), weights.array(layer + _B)
        # another rule finds a side of zeros; the product of two other sides may be zero as well
        if (size := change_size(*pair)) or (_is_sound(*pair) and all(side.any() for side in pair)):
            kind = f"{match['before']}.*.{match['kind']}"
            kinds[kind][int(match["block"])] = size
            if _ONE_PROJECTION.search(kind):
                lost[kind].add(_lost_shard(*pair))
    for kind, shards in lost.items():
        if len(shards) == 1 and (shard := shards.pop()):
            found = f"{kind}: {shard} in every block, and the others are not"
            fix = "Gather the shards of each tensor before you save the adapter; compare with the run's own checkpoint."
            yield Finding("ML424", found, place, "numbers of the training in each row and column", fix=fix)
    for kind, sizes in kinds.items():
        for block, size in sizes.items():
            nearest = sorted((abs(other - block), other) for other in sizes if other != block)[:_NEIGHBOURS]
            # the upper median: among layers that did not move, one that did is the measure
            around = statistics.median_high([sizes[other] for _, other in nearest]) if nearest else 0.0
            most = max(sizes.values())
            usual, whose = around, "the layers around it"
            if size >= LEAST_OF_NEIGHBOURS * around:
                usual, whose = most, "the one that moved most"  # where one block moved alone
            if size < (LEAST_OF_NEIGHBOURS if usual == around else LEAST_OF_ALL) * usual:
                found = f"{kind.replace('*', str(block))} hardly moved: B A is {size:.3g} a number on average"
                yield Finding("ML424", found, place, f"about {usual:.3g}, as {whose}")
    middles = {kind: statistics.median_high(sizes.values()) for kind, sizes in kinds.items()}
    most = max(middles.values(), default=0.0)
    for kind, middle in middles.items():
        if middle < LEAST_OF_ALL * most:
            found = f"{kind} hardly moved in any block: B A is {middle:.3g} a number on average"
            yield Finding("ML424", found, place, f"about {most:.3g}, as the layers that moved most")


def _lost_shard(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> str:
    """Return the outputs or inputs of a layer that lost their numbers with a shard of a tensor; empty if none did.

    Training moves each row of B that has a gradient, and A begins with numbers everywhere.

    Args:
        a: A, `(rank, inputs)`.
        b: B, `(outputs, rank)`.
    """
    import numpy as np

    for words, side in (("rows {} to {} of lora_B", b), ("columns {} to {} of lora_A", a.T)):
        zeros, size = np.flatnonzero(np.logical_not(side.any(axis=1))), len(side)
        if not len(zeros) or len(zeros) == size or size % _SHARDS:
            continue
        first, end = int(zeros[0]), int(zeros[-1]) + 1
        if end - first == len(zeros) and first % (size // _SHARDS) == 0 == end % (size // _SHARDS):
            return f"{words.format(first, end - 1)} are zero"
    return ""


def change_size(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Return the root mean square of B A, for A `(rank, inputs)` and B `(outputs, rank)`; 0.0 for faulty tensors."""
    import numpy as np

    if not _is_sound(a, b):
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    # ||B A||^2 = tr(A A^T B^T B): two matrices of rank x rank instead of one of the weight's size
    squares = float(((a @ a.T) * (b.T @ b)).sum())
    return math.sqrt(max(squares, 0.0) / (a.shape[1] * b.shape[0]))


def _is_sound(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Return whether two factors fit, and have numbers of a sane size: an exploded layer must not be the measure."""
    import numpy as np

    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        return False
    return all(is_floating(factor) and float(np.abs(factor.astype(np.float64)).max()) <= LARGEST for factor in (a, b))


_LAYERS_READ = 8
LARGEST_MAGNITUDE = 2.0
"""In 20 trained DoRA adapters, with learning rates from 1e-4 to 1e-2, the median of m / ||W|| in a layer is 0.67 to
4.6: the norms of a tiny base are small. The smallest of an adapter's layers is at most 1.6, the largest at least 0.99.
"""


def magnitude_findings(folder: AdapterFolder, layout: AdapterLayout, base: BaseFolder) -> Iterator[Finding]:
    """Yield ML428 if DoRA's magnitudes are far from the norms of the base's rows in every layer.

    A run begins with these norms.
    """
    ratios: dict[str, float] = {}
    if not folder.config.get("use_dora"):
        return
    try:
        adapter, weights = folder.weights, base.weights
        names = {layer: f"{PREFIX}{layer}.lora_magnitude_vector" for layer in layout.scalings}
        layers = [layer for layer, name in names.items() if name in adapter and f"{layer}.weight" in weights]
        for layer in layers[:: max(1, len(layers) // _LAYERS_READ)]:
            if weights.infos[f"{layer}.weight"].dtype not in ("F32", "BF16", "F16"):
                return  # a quantised weight has its norms in other tensors
            norms = weights[f"{layer}.weight"].float().norm(dim=1)
            ratios[layer] = float((adapter[names[layer]].float().reshape(-1) / norms).abs().median())
    except (MistralLoraError, RuntimeError, KeyError):
        return  # other checks report them
    least, most = min(ratios.values(), default=1.0), max(ratios.values(), default=1.0)
    if least > LARGEST_MAGNITUDE or most < 1 / LARGEST_MAGNITUDE:
        nearest = least if least > 1 else most
        layer = next(layer for layer, ratio in ratios.items() if ratio == nearest)
        found = f"the magnitudes of {layer} are {nearest:.3g} times the norms of the base's rows, the nearest to 1"
        fix = "Compare each `lora_magnitude_vector` with the norms of the base's rows, with which the run began."
        yield Finding("ML428", found, Place.of(folder.tensors_file), "about the norms", fix=fix)


_ALIKE, _LEFT = 0.35, 0.7
"""For trained PiSSA and OLoRA adapters, 1.3 to 3 is left in the plain base, and 0.0 to 0.4 in the run's base."""


def start_findings(folder: AdapterFolder, layout: AdapterLayout, base: BaseFolder) -> tuple[list[Finding], str]:
    """Look in the base's weights for the part that the adapter's initialisation took out of them.

    PiSSA, CorDA, OLoRA and LoftQ begin with a base of `W0 - s B0 A0`: on `W0` itself, `s B0 A0` counts twice.

    Returns:
        The findings, and the reason if the weights cannot decide.
    """
    start = folder.config.get("init_lora_weights")
    if start in PLAIN_STARTS:
        return [], ""
    kind, place = str(start).partition("_niter_")[0], Place.of(folder.config_file)
    undecided = f"init_lora_weights is {short_json(start)}, which needs a base of its own, and {base} does not show it"
    shares: list[float] = []
    try:
        adapter, weights = folder.weights, base.weights
        layers = [layer for layer in layout.scalings if f"{layer}.weight" in weights]
        for layer in layers[:: max(1, len(layers) // _LAYERS_READ)]:
            a, b = (adapter[f"{PREFIX}{layer}{side}"].float() for side in (_A, _B))
            weight = weights[f"{layer}.weight"].float()
            if kind == "loftq":
                shares.append(_full_precision(weight, folder.config.get("loftq_config")))
            elif kind in ("pissa", "corda") or (kind == "olora" and layout.scalings[layer] >= 1):
                shares.append(part_left(weight, a, b))
    except (MistralLoraError, RuntimeError, KeyError) as error:
        return [], f"{undecided}: {error}"
    share = statistics.median(shares) if shares else math.nan
    if share > _LEFT:
        found = f"init_lora_weights is {short_json(start)}, and {base} still has the part that the adapter began with"
        expected = "the base that the run began with, or the adapter converted to a plain LoRA"
        return [Finding("ML423", found, place, expected)], ""
    return [], undecided if math.isnan(share) else ""


def part_left(weight: Any, a: Any, b: Any) -> float:
    """Return a weight's share in the columns of B: 1.0 as in any other columns, 0.0 if it was taken out."""
    import torch

    basis = torch.linalg.qr(b)[0]  # (outputs, rank)
    within, change = basis.T @ weight, (basis.T @ b) @ a
    alike = float((within * change).sum()) / max(float(within.norm() * change.norm()), 1e-30)
    # B A moves little in training: alike on W0; unlike on W0 - s B0 A0 for OLoRA with s > 1
    if abs(alike) > _ALIKE:
        return 1.0 if alike > 0 else 0.0
    # its squares there, beside those of as many of its directions on average
    usual: float = float(weight.square().sum()) * b.shape[1] / b.shape[0]
    return float(within.square().sum()) / max(usual, 1e-30)


def _full_precision(weight: Any, config: Any) -> float:
    """Return the share of blocks with more values than LoftQ's quantisation has; NaN if blocks cannot show it."""
    bits = config.get("loftq_bits", 4) if isinstance(config, dict) else 4
    if bits not in (2, 4) or weight.numel() % 64:
        return math.nan
    # PEFT quantises blocks of 64 numbers, each to one of 4 or 16 values
    blocks = weight.reshape(-1, 64)[:256].sort(dim=1).values
    distinct = (blocks[:, 1:] != blocks[:, :-1]).sum(dim=1) + 1
    return float((distinct > 2**bits).float().mean())
