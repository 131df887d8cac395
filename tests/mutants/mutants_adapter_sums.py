"""Adapters that were combined from others, and are not the sum that was asked for."""

from __future__ import annotations

import json

import torch
from bench_adapter import CONFIG, of_sources
from combined_adapters import RANK, combined_adapters
from gallery import Artifact, mutant
from safetensors.torch import load_file

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


@mutant("ML460", "N84", says="2.828 times too strong, as 1.98 · first + 0.8485 · second")
def rslora_inherited_by_a_concatenation(artifact: Artifact) -> None:
    """PEFT's `cat` leaves use_rslora on, and the sum is √r times too strong."""
    of_sources(artifact, combined_adapters("cat", use_rslora=True))


@mutant("ML460 ML461", "N84", says="2 times too strong, as 1.4 · first + 0.6 · second")
def rslora_inherited_by_a_decomposition(artifact: Artifact) -> None:
    """The same with PEFT's `svd`, which cuts the sum to the rank of its sources as well."""
    of_sources(artifact, combined_adapters("svd", use_rslora=True))


@mutant("ML460 ML461", "N84", "N87", says="2 times too strong, as 2 · first - 1 · second")
def rslora_inherited_by_a_sum_of_factors(artifact: Artifact) -> None:
    """The same with PEFT's `linear`, with a negative weight."""
    of_sources(artifact, combined_adapters("linear", (1.0, -0.5), use_rslora=True))


@mutant("ML460", "N84", says="2 times too strong, as 2 · first")
def rslora_inherited_by_a_copy(artifact: Artifact) -> None:
    """One adapter with the weight 1 is not itself again."""
    of_sources(artifact, combined_adapters("linear", (1.0,), use_rslora=True))


@mutant("ML461", "N87", says="B of each meets A of the others")
def factors_summed_before_they_are_multiplied(artifact: Artifact) -> None:
    """PEFT's `linear` sums A and B, and multiplies the sums."""
    of_sources(artifact, combined_adapters("linear"))


@mutant("ML461", says="is lost: it is cut to rank 4")
def sum_cut_to_the_rank_of_its_sources(artifact: Artifact) -> None:
    """PEFT's `svd` keeps the highest rank of the sources unless it is told another."""
    of_sources(artifact, combined_adapters("svd"))


@mutant(
    "ML460",
    "N85",
    says="2 times too strong, as 1.2 · first + 0.6 · second (2: the scale of the sources is in it twice)",
)
def scale_of_the_sources_twice(artifact: Artifact) -> None:
    """The `svd` of PEFT before 0.21 applied the scale of each source, 2, twice."""
    of_sources(artifact, combined_adapters("svd", (0.6 * 2, 0.3 * 2), rank=2 * RANK))
    artifact["config"]["peft_version"] = "0.20.0"


@mutant("ML460", "N86", says="the sign of a weight is lost: A and B of first or second are both negated")
def sign_of_a_weight_on_both_sides(artifact: Artifact) -> None:
    """PEFT 0.18 negated A and B of an adapter with a negative weight, so that it was added."""
    of_sources(artifact, combined_adapters("linear", (1.0, -1.0)))
    first, second = (load_file(source / "adapter_model.safetensors") for source in artifact["others"])
    # with the scale 2 of the sources, and 1 of the sum
    artifact["tensors"] = {name: (first[name] - second[name]) * 2**0.5 for name in first}


@mutant("ML426 ML460", "N88", says="the magnitudes of DoRA have no such sum")
def magnitudes_lost(artifact: Artifact) -> None:
    """PEFT adds the products of DoRA adapters, and leaves the base's magnitudes beside them."""
    of_sources(artifact, combined_adapters("cat", use_dora=True))


@mutant("ML460", says="q_proj.weight has A of model.layers.1.self_attn.q_proj")
def a_of_another_layer(artifact: Artifact) -> None:
    """Two layers have swapped their A."""
    of_sources(artifact, combined_adapters("cat"))
    tensors, names = artifact["tensors"], [f"{layer}.lora_A.weight" for layer in (Q0, Q1)]
    tensors[names[0]], tensors[names[1]] = (tensors[name] for name in reversed(names))


@mutant("ML460", says="has A and B of model.layers.1.self_attn.q_proj.weight")
def layers_swapped(artifact: Artifact) -> None:
    """Two layers are swapped."""
    of_sources(artifact, combined_adapters("cat"))
    artifact["tensors"] = {
        name.replace(Q0, "?").replace(Q1, Q0).replace("?", Q1): tensor for name, tensor in artifact["tensors"].items()
    }


@mutant("ML460 ML461", "N87", says="model.layers.1.self_attn.q_proj.weight is 3 times the sum of the other layers")
def scale_of_one_layer(artifact: Artifact) -> None:
    """One layer is three times as strong as the sum."""
    of_sources(artifact, combined_adapters("linear"))
    artifact["tensors"][f"{Q1}.lora_B.weight"] *= 3


@mutant("ML460", says="q_proj.weight is 0.3 · first + 0.7 · second")
def weights_of_one_layer(artifact: Artifact) -> None:
    """The weights of one layer are swapped."""
    of_sources(artifact, combined_adapters("cat"))
    other = load_file(combined_adapters("cat", (0.3, 0.7)).combined / "adapter_model.safetensors")
    for part in ("A", "B"):
        artifact["tensors"][f"{Q1}.lora_{part}.weight"] = other[f"{Q1}.lora_{part}.weight"].clone()


@mutant("ML460 ML401", says="model.layers.1.self_attn.q_proj.weight is left out")
def layer_left_out(artifact: Artifact) -> None:
    """The sum lacks a layer of its sources."""
    of_sources(artifact, combined_adapters("cat"))
    artifact["tensors"] = {name: tensor for name, tensor in artifact["tensors"].items() if not name.startswith(Q1)}


@mutant("ML460", says="is another change (cosine")
def layer_of_no_source(artifact: Artifact) -> None:
    """One layer was drawn at random."""
    of_sources(artifact, combined_adapters("cat"))
    tensor = artifact["tensors"][f"{Q1}.lora_B.weight"]
    random = torch.Generator().manual_seed(5)
    artifact["tensors"][f"{Q1}.lora_B.weight"] = torch.randn(tensor.shape, generator=random) / 50
    name = f"{Q1}.lora_A.weight"
    artifact["tensors"][name] = torch.randn(artifact["tensors"][name].shape, generator=random) / 10


@mutant("ML460", says="A and B are those of different adapters: 1 · B of first with A of second")
def a_and_b_of_two_adapters(artifact: Artifact) -> None:
    """A was taken from one adapter, and B from the other."""
    made = combined_adapters("cat")
    of_sources(artifact, made)
    first, second = (load_file(source / "adapter_model.safetensors") for source in made.sources)
    artifact["config"] = json.loads((made.sources[0] / CONFIG).read_text())
    artifact["tensors"] = {name: (first if "lora_B" in name else second)[name].clone() for name in first}


@mutant("ML462", "N84", says="0.5 times its own, 1 / √4: use_rslora")
def rslora_lost_in_a_copy(artifact: Artifact) -> None:
    """A copy of an adapter lost use_rslora."""
    made = combined_adapters("cat", use_rslora=True)
    of_sources(artifact, made)
    artifact["config"] = json.loads((made.sources[0] / CONFIG).read_text()) | {"use_rslora": False}
    artifact["tensors"] = {
        name: tensor.clone() for name, tensor in load_file(made.sources[0] / "adapter_model.safetensors").items()
    }


@mutant("ML462", says="the scale is 2 times its own")
def alpha_changed_in_a_copy(artifact: Artifact) -> None:
    """A copy of an adapter has twice its lora_alpha."""
    made = combined_adapters("cat")
    of_sources(artifact, made)
    artifact["config"] = json.loads((made.sources[0] / CONFIG).read_text()) | {"lora_alpha": 4 * RANK}
    artifact["tensors"] = {
        name: tensor.clone() for name, tensor in load_file(made.sources[0] / "adapter_model.safetensors").items()
    }
