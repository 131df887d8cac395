"""Adapters whose numbers are not those of a training run."""

from __future__ import annotations

import torch
from bench_adapter import LAYER
from gallery import Artifact, mutant
from safetensors.torch import load_file


def of_dora(artifact: Artifact, factor: float) -> None:
    """Make the adapter one of DoRA, with magnitudes by a factor of the norms of the base's rows."""
    artifact["config"]["use_dora"] = True
    base = load_file(artifact["base"] / "model.safetensors")
    for name in [name for name in artifact["tensors"] if "lora_A" in name]:
        layer = name.removesuffix(".lora_A.weight")
        norms = torch.linalg.norm(base[f"{layer.removeprefix('base_model.model.')}.weight"].float(), dim=1)
        artifact["tensors"][f"{layer}.lora_magnitude_vector"] = norms * factor


@mutant("ML402", "I45", says="not finite")
def not_a_number(artifact: Artifact) -> None:
    """One number is NaN."""
    artifact["tensors"][LAYER][0, 0] = float("nan")


@mutant("ML402", "I45", says="not finite")
def infinite_in_half_precision(artifact: Artifact) -> None:
    """A number was too large for float16."""
    artifact["tensors"] = {name: one.half() for name, one in artifact["tensors"].items()}
    artifact["tensors"][LAYER] *= 1e6


@mutant("ML403 ML413", "I49", says="learned nothing")
def loaded_frozen(artifact: Artifact) -> None:
    """The adapter was loaded without is_trainable: its lora_B are still zero."""
    for name, one in artifact["tensors"].items():
        one.mul_("lora_B" not in name)


@mutant("ML403", "I49", says="layers.1.")
def one_layer_not_trained(artifact: Artifact) -> None:
    """One layer's lora_B is zero."""
    artifact["tensors"][LAYER.replace("layers.0", "layers.1").replace("lora_A", "lora_B")].zero_()


@mutant("ML403", "I49", says="lora_A.weight is zero")
def lora_a_zero(artifact: Artifact) -> None:
    """One layer's lora_A is zero."""
    artifact["tensors"][LAYER].zero_()


@mutant("ML417", says="again")
def layers_all_alike(artifact: Artifact) -> None:
    """The generator was seeded anew for each layer, so that all have the same lora_A."""
    for name, one in artifact["tensors"].items():
        if "lora_A" in name:
            one.copy_(artifact["tensors"][LAYER])


@mutant("ML413", "I61", says="changes no logit")
def scale_of_almost_nothing(artifact: Artifact) -> None:
    """The scale is so small that no logit moves."""
    artifact["config"]["lora_alpha"] = 1e-12


@mutant("ML414", "I46", says="I8")
def tensors_quantised(artifact: Artifact) -> None:
    """A tensor has whole numbers of 8 bits."""
    artifact["tensors"][LAYER] = (artifact["tensors"][LAYER] * 100).char()


@mutant("ML415", "I46", says="BF16 and F32")
def dtypes_mixed(artifact: Artifact) -> None:
    """A tensor has another dtype than the others."""
    artifact["tensors"][LAYER] = artifact["tensors"][LAYER].bfloat16()


@mutant("ML415", "I46", says="F64")
def tensors_in_float64(artifact: Artifact) -> None:
    """The tensors are twice as wide as they were trained."""
    artifact["tensors"] = {name: one.double() for name, one in artifact["tensors"].items()}


@mutant("ML416", "I45", says="has a number of")
def numbers_of_a_diverged_run(artifact: Artifact) -> None:
    """A tensor has numbers in the hundred thousands."""
    artifact["tensors"][LAYER] *= 1e7


def _moved(artifact: Artifact, factor: float, *parts: str) -> None:
    for name, one in artifact["tensors"].items():
        if "lora_B" in name and any(part in name for part in parts):
            one.mul_(factor)


@mutant("ML424", "I49", says="layers.1.self_attn.v_proj hardly moved")
def layer_that_hardly_moved(artifact: Artifact) -> None:
    """The lora_B of one layer is a thousand times smaller than its neighbour's: it was frozen, but for rounding."""
    _moved(artifact, 1e-3, "layers.1.self_attn.v_proj")


@mutant("ML424", "I49", says="layers.0.self_attn.k_proj hardly moved")
def block_that_hardly_moved(artifact: Artifact) -> None:
    """A whole block got a learning rate of almost nothing."""
    _moved(artifact, 1e-3, "layers.0.")


@mutant("ML424", "I49", says="layers.1.self_attn.q_proj hardly moved: B A is 0")
def product_of_zero(artifact: Artifact) -> None:
    """Neither side of a layer is zero, and their product is: each rank has lost one of its two vectors."""
    for name, one in artifact["tensors"].items():
        if ".layers.1.self_attn.q_proj." in name:
            (one[1:] if "lora_A" in name else one[:, :1]).zero_()


@mutant("ML424", "I49", says="*.self_attn.o_proj hardly moved in any block")
def kind_that_hardly_moved(artifact: Artifact) -> None:
    """One kind of layers was in no group of the optimizer, and only decayed."""
    _moved(artifact, 1e-5, "o_proj")


@mutant("ML424", says="rows 64 to 127 of lora_B are zero in every block")
def shard_that_was_lost(artifact: Artifact) -> None:
    """The second of two processes' rows of each lora_B are zero."""
    for name, one in artifact["tensors"].items():
        if "lora_B" in name:
            one[len(one) // 2 :].zero_()


@mutant("ML424", says="columns 0 to 31 of lora_A are zero in every block")
def shard_of_inputs_that_was_lost(artifact: Artifact) -> None:
    """The first of four processes' columns of each o_proj's lora_A are zero."""
    for name, one in artifact["tensors"].items():
        if "o_proj.lora_A" in name:
            one[:, : one.shape[1] // 4].zero_()


@mutant("ML428 ML426", says="3 times the norms of the base's rows")
def magnitudes_three_times_too_large(artifact: Artifact) -> None:
    """The magnitudes of DoRA were multiplied by the scale of the adapter."""
    of_dora(artifact, 3.0)
