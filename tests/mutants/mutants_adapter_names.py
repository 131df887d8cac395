"""Adapters whose tensors are missing, too many, or named as PEFT does not look for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench_adapter import LAYER
from gallery import Artifact, mutant
from safetensors.torch import load_file
from trained import WEIGHTS


def _renamed(artifact: Artifact, rename: Callable[[str], str]) -> None:
    artifact["tensors"] = {rename(name): tensor for name, tensor in artifact["tensors"].items()}


@mutant("ML401", "I16", says="no tensors")
def no_tensors(artifact: Artifact) -> None:
    """The tensors were filtered away when the adapter was saved: a sound file of 40 bytes."""
    artifact["tensors"].clear()


@mutant("ML401", "I16", says="k_proj")
def tensors_of_one_target_missing(artifact: Artifact) -> None:
    """The tensors of k_proj were not saved."""
    artifact["tensors"] = {name: one for name, one in artifact["tensors"].items() if "k_proj" not in name}


@mutant("ML401", "I16", says="layers.1.")
def tensors_of_the_last_layer_missing(artifact: Artifact) -> None:
    """The last layer's tensors were not saved."""
    artifact["tensors"] = {name: one for name, one in artifact["tensors"].items() if ".layers.1." not in name}


@mutant("ML412 ML426", "I16", says="shape (0,)")
def tensors_not_gathered(artifact: Artifact) -> None:
    """Sharded training saved a tensor that it had not gathered."""
    artifact["tensors"]["base_model.model.lm_head.weight"] = torch.zeros(0)
    artifact["config"]["modules_to_save"] = ["lm_head"]


@mutant("ML404", "I16", says="shape (0,)")
def lora_tensors_not_gathered(artifact: Artifact) -> None:
    """Sharded training saved a lora_B of no elements."""
    artifact["tensors"][LAYER.replace("lora_A", "lora_B")] = torch.ones(0)


@mutant("ML407", "I17", says="'base_model.model.' is missing")
def prefix_missing(artifact: Artifact) -> None:
    """The names lack PEFT's prefix."""
    _renamed(artifact, lambda name: name.removeprefix("base_model.model."))


@mutant("ML407", "I17", says="there twice")
def prefix_doubled(artifact: Artifact) -> None:
    """The names have PEFT's prefix twice."""
    _renamed(artifact, lambda name: f"base_model.model.{name}")


@mutant("ML407", "I17", says="the adapter's name 'default'")
def adapter_name_inside(artifact: Artifact) -> None:
    """The names have the adapter's own name in them, as in memory."""
    _renamed(artifact, lambda name: name.replace(".weight", ".default.weight"))


@mutant("ML407", "I17", says="begins with 'base_model.model.', not")
def model_dropped(artifact: Artifact) -> None:
    """The names are those of the bare model, without its head."""
    _renamed(artifact, lambda name: name.replace("base_model.model.model.", "base_model.model."))


@mutant("ML407", "I17", says="'language_model.' is in it")
def language_model_inserted(artifact: Artifact) -> None:
    """The names are those of a model with images."""
    _renamed(artifact, lambda name: name.replace("model.layers", "model.language_model.layers"))


@mutant("ML407", "I17", says="'module.' is in it")
def names_of_a_parallel_wrapper(artifact: Artifact) -> None:
    """The names were taken from a model inside DistributedDataParallel."""
    _renamed(artifact, lambda name: f"module.{name}")


@mutant("ML407", "I17", says="'_orig_mod.' is in it")
def names_of_a_compiled_model(artifact: Artifact) -> None:
    """The names were taken from a compiled model."""
    _renamed(artifact, lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."))


@mutant("ML407", "I17", says="'.base_layer' is in it")
def base_layer_inside(artifact: Artifact) -> None:
    """The names are those of an adapter on an adapter."""
    _renamed(artifact, lambda name: name.replace(".lora_", ".base_layer.lora_"))


@mutant("ML407", "I17", says="8 names")
def half_of_the_names_changed(artifact: Artifact) -> None:
    """Only one block's names are wrong."""
    _renamed(artifact, lambda name: name.replace("model.model.layers.1", "model.decoder.layers.1"))


@mutant("ML401", "I17", says="attention.wq")
def names_of_another_library(artifact: Artifact) -> None:
    """The layers are named as in mistral-inference."""
    _renamed(artifact, lambda name: name.replace("self_attn.q_proj", "attention.wq"))


@mutant("ML401", says="fits no adapted layer")
def biases_that_nothing_explains(artifact: Artifact) -> None:
    """There is a bias, and the configuration trains none."""
    artifact["tensors"][LAYER.replace("lora_A.weight", "lora_B.bias")] = torch.ones(128)


@mutant("ML401 ML426", says="lora_magnitude_vector is missing")
def dora_without_magnitudes(artifact: Artifact) -> None:
    """The configuration says DoRA, and there are no magnitudes."""
    artifact["config"]["use_dora"] = True


@mutant("ML401", says="lora_magnitude_vector fits no")
def magnitudes_without_dora(artifact: Artifact) -> None:
    """There are magnitudes, and the configuration says no DoRA: PEFT leaves them out."""
    artifact["tensors"][LAYER.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(128)


@mutant("ML401 ML426", says="lm_head.weight is missing")
def saved_module_missing(artifact: Artifact) -> None:
    """The configuration says that the head was trained, and it is not there."""
    artifact["config"]["modules_to_save"] = ["lm_head"]


@mutant("ML401", says="lm_head.weight fits no")
def saved_module_that_nothing_explains(artifact: Artifact) -> None:
    """There is a head of the base's size, and the configuration trains none."""
    artifact["tensors"]["base_model.model.lm_head.weight"] = load_file(artifact["base"] / WEIGHTS)["lm_head.weight"]


@mutant("ML412", "I38", says="32770, 128")
def vocabulary_resized(artifact: Artifact) -> None:
    """Two tokens were added, and PEFT saved the resized embeddings."""
    for name in ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"):
        artifact["tensors"][name] = torch.ones(32770, 128)


@mutant("ML412 ML426", "I38", says="32770, 128")
def vocabulary_resized_and_trained(artifact: Artifact) -> None:
    """Two tokens were added, and the embeddings were trained in full."""
    artifact["config"]["modules_to_save"] = ["embed_tokens", "lm_head"]
    vocabulary_resized.change(artifact)
