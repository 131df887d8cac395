"""Adapters of one class of models on another, and on layers that text does not train."""

from __future__ import annotations

import transformers
from bench_adapter import EXPERTS, LATENT_PATTERN, NAMES, of_class
from gallery import Artifact, mutant
from of_classes import made_adapter, tiny_base

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS

USUAL_PATTERN = r".*\.layers\.\d+\.(mlp|self_attn)\.(up|down|gate|q|k|v|o)_proj"


@mutant("ML450", "N80", says="8 of 24 tensors are on the model of images, and 4 of them never moved")
def last_names_reach_the_vision_tower(artifact: Artifact) -> None:
    """The list of last names adapts the vision tower of a Mistral3, too."""
    of_class(artifact, made_adapter("wrapped-mistral", NAMES))


@mutant("ML450", says="multi_modal_projector")
def all_linear_reaches_the_projector(artifact: Artifact) -> None:
    """`all-linear` adapts the vision tower and the projector."""
    of_class(artifact, made_adapter("wrapped-mistral", "all-linear"))


@mutant("ML451", "N81", says="target_modules names q_a_proj, q_b_proj, kv_b_proj, and o_proj alone is adapted")
def pattern_that_reaches_one_kind(artifact: Artifact) -> None:
    """The pattern is one of another class, and o_proj is the only name that both have."""
    of_class(artifact, made_adapter("mistral", LATENT_PATTERN))


@mutant("ML452" if EXPERTS == "ML453" else "ML426 ML452", says="the router of the model changed")
def router_is_adapted(artifact: Artifact) -> None:
    """The router of a Mixtral is adapted with the attention."""
    of_class(artifact, made_adapter("mixtral", ("gate", "q_proj")))


@mutant(EXPERTS, "N82", says="the experts of the model changed")
def experts_are_adapted(artifact: Artifact) -> None:
    """The experts of a Mixtral are adapted, by their names of transformers 4."""
    of_class(artifact, made_adapter("mixtral", ("w1", "w2", "w3")))


@mutant("ML401", "N207", says=".experts.")
def experts_left_out_by_an_older_peft(artifact: Artifact) -> None:
    """The attention alone is adapted, and the experts are named, as PEFT 0.18 leaves it under transformers 5."""
    of_class(artifact, made_adapter("mixtral", ("q_proj",)))
    artifact["config"]["target_modules"] = ["q_proj", "w1", "w2", "w3"]


@mutant("ML454", says="MixtralForCausalLM has no down_proj: experts are in its place")
def adapter_of_a_dense_model_on_experts(artifact: Artifact) -> None:
    """The adapter has the MLP of a Mistral, and the base is a Mixtral."""
    made = made_adapter("mistral", ("q_proj", "gate_proj", "up_proj", "down_proj"))
    of_class(artifact, made, tiny_base("mixtral"))


@mutant("ML454", says="auto_mapping has the class MinistralForCausalLM")
def adapter_of_a_class_with_the_same_names(artifact: Artifact) -> None:
    """Names and shapes fit: the adapter was trained with alternating windows, and the base has none."""
    of_class(artifact, made_adapter("ministral", NAMES), tiny_base("mistral"))


@mutant("ML425", "N37", says="language_model.layers.0.self_attn.k_proj.lora_A.weight")
def text_names_on_a_real_base_with_images(artifact: Artifact) -> None:
    """The adapter was trained on the text model alone, and is put on the whole: PEFT warns and changes nothing."""
    of_class(artifact, made_adapter("mistral", NAMES), tiny_base("wrapped-mistral"))
    artifact["config"].update(auto_mapping=None, task_type="CAUSAL_LM")


if hasattr(transformers, "TokenizersBackend"):

    @mutant("ML412 ML426 ML453", "N82", says="mlp.experts.base_layer.lora_A.weight has shape")
    def experts_in_the_layout_of_an_older_peft(artifact: Artifact) -> None:
        """The tensors of fused experts are transposed, as PEFT 0.18 has them."""
        of_class(artifact, made_adapter("mixtral", ("w1", "w2", "w3")))
        tensors = artifact["tensors"]
        for name in [name for name in tensors if ".experts." in name and ".lora_A." in name]:
            other = name.replace(".lora_A.", ".lora_B.")
            tensors[name], tensors[other] = tensors[other].T.clone(), tensors[name].T.clone()


if hasattr(transformers, "Mistral4ForCausalLM"):

    @mutant("ML451", says="and o_proj alone is adapted")
    def usual_pattern_on_latent_attention(artifact: Artifact) -> None:
        """The pattern of seven projections is used on Mistral Small 4's text model."""
        of_class(artifact, made_adapter("wrapped-mistral4", USUAL_PATTERN))

    @mutant("ML409", says="target_modules has 'q_proj', which matches nothing")
    def usual_list_on_latent_attention(artifact: Artifact) -> None:
        """The list of four projections matches o_proj alone in latent attention."""
        of_class(artifact, made_adapter("mistral4", NAMES))

    @mutant("ML454", says="Mistral4ForCausalLM has no k_proj: its attention is q_a_proj")
    def adapter_of_another_attention(artifact: Artifact) -> None:
        """The adapter of a Mistral is put on a base with latent attention."""
        of_class(artifact, made_adapter("mistral", NAMES), tiny_base("mistral4"))

    LATENT = TEXT_MODELS["mistral4"].attention

    @mutant("ML427", says="layers.0.self_attn.kv_b_proj, and 1 more")
    def layer_that_vllm_never_calls(artifact: Artifact) -> None:
        """An adapter on the whole attention of a Mistral 4, of which vLLM leaves out a layer."""
        of_class(artifact, made_adapter("mistral4", LATENT))
