"""Merged models whose changes are not those of an adapter."""

from __future__ import annotations

import json

import torch
from bench_merged import EMBEDDINGS, HEAD, K1, NORM, Q1, changed, low_rank_head, merge_in, random_like
from gallery import Artifact, mutant
from safetensors.torch import save_file
from trained import WEIGHTS


@mutant("ML413", "I61", "N40", says="nothing was merged")
def merged_is_the_base(artifact: Artifact) -> None:
    """LoRA was stripped when the model was saved: every weight is the base's."""
    artifact["tensors"] = {name: tensor.clone() for name, tensor in artifact["before"].items()}


@mutant("ML413", says="nothing was merged")
def merged_is_the_base_in_another_dtype(artifact: Artifact) -> None:
    """Every weight is the base's, rounded to float16."""
    artifact["tensors"] = {name: tensor.half().bfloat16() for name, tensor in artifact["before"].items()}


@mutant("ML430", "N41", says=NORM)
def norm_changed(artifact: Artifact) -> None:
    """The last norm is another."""
    artifact["tensors"][NORM] += 0.125


@mutant("ML430", "N41", says="32768 of 32768 rows")
def embeddings_changed(artifact: Artifact) -> None:
    """Every embedding was moved, and no adapter does that."""
    artifact["tensors"][EMBEDDINGS] += random_like(artifact["tensors"][EMBEDDINGS]) / 10


@mutant("ML430", "N41", says="in 1 of 32768 rows")
def one_row_of_the_head_changed(artifact: Artifact) -> None:
    """One row of the head is zero."""
    artifact["tensors"][HEAD][1000] = 0


@mutant("ML431", "N41", says=f"the change of {Q1} has rank")
def garbage_of_the_right_size(artifact: Artifact) -> None:
    """A matrix has random numbers of the base's scale."""
    artifact["tensors"][Q1] = random_like(artifact["tensors"][Q1])


@mutant("ML431", says="has rank")
def two_layers_swapped(artifact: Artifact) -> None:
    """q_proj of two layers are swapped."""
    other, tensors = Q1.replace(".1.", ".2."), artifact["tensors"]
    tensors[Q1], tensors[other] = tensors[other], tensors[Q1]


@mutant("ML430 ML431", says="has rank")
def trained_in_full(artifact: Artifact) -> None:
    """Every weight was trained: a full fine-tune, and no merge."""
    for name, before in artifact["before"].items():
        artifact["tensors"][name] = before + random_like(before) / 10 + (before.ndim == 1) / 8


@mutant("ML432", "N40", says="self_attn.k_proj is the base's in layer 1")
def one_change_lost(artifact: Artifact) -> None:
    """k_proj of one layer is the base's."""
    artifact["tensors"][K1] = artifact["before"][K1].clone()


@mutant("ML433", "N41", says="times its norm")
def change_a_hundred_times_too_large(artifact: Artifact) -> None:
    """The change of one layer is scaled by 100."""
    artifact["tensors"][Q1] = changed(artifact, Q1, 100)


@mutant("ML434", "I61", says="merged 0.500 times")
def half_of_the_scale(artifact: Artifact) -> None:
    """The adapter was merged with alpha / (2 r)."""
    artifact["adapter_at_hand"] = True
    config = json.loads((artifact["adapter"] / "adapter_config.json").read_text())
    (artifact["adapter"] / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))


@mutant("ML434", "I61", says="1 / √r: see use_rslora")
def rslora_lost(artifact: Artifact) -> None:
    """The adapter has use_rslora, and was merged without it."""
    artifact["adapter_at_hand"] = True
    config = json.loads((artifact["adapter"] / "adapter_config.json").read_text())
    (artifact["adapter"] / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))


@mutant("ML434", "I61", says=f"{K1}: the adapter is merged")
def alpha_pattern_lost(artifact: Artifact) -> None:
    """The adapter has a scale of its own for one layer, and was merged without it."""
    artifact["adapter_at_hand"] = True
    config = json.loads((artifact["adapter"] / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"model.layers.1.self_attn.k_proj": 64}
    (artifact["adapter"] / "adapter_config.json").write_text(json.dumps(config))


@mutant("ML434", says="has the change of")
def changes_swapped(artifact: Artifact) -> None:
    """The changes of two layers are swapped."""
    artifact["adapter_at_hand"] = True
    other, tensors, before = Q1.replace(".1.", ".2."), artifact["tensors"], artifact["before"]
    parts = {name: tensors[name].float() - before[name].float() for name in (Q1, other)}
    tensors[Q1] = (before[Q1].float() + parts[other]).bfloat16()
    tensors[other] = (before[other].float() + parts[Q1]).bfloat16()


@mutant("ML434", says="the adapter's change is missing")
def one_layer_lost(artifact: Artifact) -> None:
    """The last layer's changes are lost, and the adapter has them."""
    artifact["adapter_at_hand"] = True
    for name, before in artifact["before"].items():
        if ".layers.2." in name:
            artifact["tensors"][name] = before.clone()


@mutant("ML434", "I61", says="merged 2.000 times")
def merged_twice(artifact: Artifact) -> None:
    """The adapter was added twice."""
    artifact["adapter_at_hand"] = True
    for name in [name for name in artifact["tensors"] if "_proj" in name]:
        artifact["tensors"][name] = changed(artifact, name, 2)


@mutant("ML434", "I61", says="the adapter is merged 1.050 times")
def a_twentieth_too_much_in_float16(artifact: Artifact) -> None:
    """The scale was 1.05 times the adapter's."""
    merge_in(artifact, torch.float16, 1.05)


@mutant("ML434", "I61", says="the adapter is merged 0.950 times")
def a_twentieth_too_little_in_float32(artifact: Artifact) -> None:
    """The scale was 0.95 times the adapter's, in float32."""
    merge_in(artifact, torch.float32, 0.95)


@mutant("ML430", says="the adapter does not change it")
def norm_changed_beside_the_adapter(artifact: Artifact) -> None:
    """A norm is another, and the adapter has none."""
    artifact["adapter_at_hand"] = True
    artifact["tensors"][NORM] += 0.125


@mutant("ML431", "N41", says="8 rows or columns of model.layers.1.self_attn.q_proj.weight are zero")
def shard_of_zeros(artifact: Artifact) -> None:
    """A part of a matrix was not gathered: its rows are zero."""
    artifact["tensors"][Q1][8:16] = 0


@mutant("ML431", "N41", says="4 rows or columns of model.layers.1.self_attn.q_proj.weight are zero")
def columns_of_zeros(artifact: Artifact) -> None:
    """The same with columns."""
    artifact["tensors"][Q1][:, 28:] = 0


@mutant("ML431", "N41", says="have other scales, and nothing else")
def matrix_scaled(artifact: Artifact) -> None:
    """A matrix was scaled in place of changed."""
    artifact["tensors"][Q1] = (artifact["before"][Q1].float() * 1.05).bfloat16()


@mutant("ML430", "N41", says="lm_head.weight changed by 0.05")
def head_scaled(artifact: Artifact) -> None:
    """The head was scaled."""
    artifact["tensors"][HEAD] = (artifact["tensors"][HEAD].float() * 1.05).bfloat16()


@mutant("ML438", says="nothing is changed in layer 2")
def last_layer_is_the_base_s(artifact: Artifact) -> None:
    """Nothing is changed in the last layer, and no adapter is named."""
    for name, before in artifact["before"].items():
        if ".layers.2." in name:
            artifact["tensors"][name] = before.clone()


@mutant("ML439", says=f"{HEAD} changed by")
def low_rank_change_of_the_head(artifact: Artifact) -> None:
    """The head has a change of low rank, and no adapter is named."""
    artifact["tensors"][HEAD] = low_rank_head(artifact)


@mutant("ML432", "N40", says="nothing is changed in layer 1, and each layer before and behind it")
def middle_layer_is_the_base_s(artifact: Artifact) -> None:
    """Nothing is changed in a layer between changed ones, and no adapter is named."""
    for name, before in artifact["before"].items():
        if ".layers.1." in name:
            artifact["tensors"][name] = before.clone()


@mutant("ML432", "N40", says="every weight of model-00002-of-00002.safetensors is the base's, and layer 1 is changed")
def stale_shard(artifact: Artifact) -> None:
    """The second shard is the base's, and begins within a layer."""
    second = [name for name in artifact["tensors"] if ".layers.2." in name or ".layers.1.mlp." in name]
    write_shards(artifact, second, second)


@mutant("ML432", "N40", says="the base's, and each layer is changed in the other files")
def stale_shard_of_whole_layers(artifact: Artifact) -> None:
    """The second shard is the base's, and begins with a layer."""
    second = [name for name in artifact["tensors"] if ".layers.2." in name or name == NORM]
    write_shards(artifact, second, second)


def write_shards(artifact: Artifact, second: list[str], of_base: list[str]) -> None:
    """Write the weights as two shards with their index, some of them those of the base.

    Args:
        artifact: The merged model. The bench writes no tensors that it has not changed itself.
        second: The names in the second shard.
        of_base: The names whose numbers are the base's.
    """
    folder, where = artifact["folder"], {}
    (folder / WEIGHTS).unlink()
    first = [name for name in artifact["tensors"] if name not in second]
    for number, names in enumerate((first, second), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        sides = {name: artifact["before" if name in of_base else "tensors"][name].contiguous() for name in names}
        save_file(sides, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
