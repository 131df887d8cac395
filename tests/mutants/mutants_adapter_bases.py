"""Adapters beside a base that is not theirs, or was changed."""

from __future__ import annotations

from bench_adapter import CONFIG
from gallery import Artifact, mutant
from trained import trained


@mutant("ML401 ML412", "I38", says="shape (8, 128)")
def base_of_another_size(artifact: Artifact) -> None:
    """The base has wider and fewer layers than the one that was trained."""
    artifact["base_config"] |= {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 1}


@mutant("ML208", says="the base is ['GemmaForCausalLM']")
def base_of_an_unknown_class(artifact: Artifact) -> None:
    """The user names a base of a class whose layers are not known here."""
    artifact["base_config"] |= {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}


@mutant("ML208 ML401", says="no tensors")
def no_tensors_for_a_base_of_an_unknown_class(artifact: Artifact) -> None:
    """The adapter is empty, and the class of the base is not known here."""
    base_of_an_unknown_class.change(artifact)
    artifact["tensors"].clear()


@mutant("ML419", "I61", says="merged with this adapter already")
def base_is_the_merged_model(artifact: Artifact) -> None:
    """The base is the model that the adapter was merged into: it is applied twice."""
    (artifact["base"] / "manifest.json").write_bytes((trained().merged / "manifest.json").read_bytes())


@mutant("ML419", "I61", says="has an adapter in its folder")
def base_with_an_adapter(artifact: Artifact) -> None:
    """The base's folder has an adapter, which transformers puts on it."""
    (artifact["base"] / CONFIG).write_bytes((artifact["folder"] / CONFIG).read_bytes())


@mutant("ML420", "I38", says="lm_head, which the base keeps as one")
def head_of_a_tied_base(artifact: Artifact) -> None:
    """The head is adapted, and the base ties it to the embeddings."""
    artifact["base_config"]["tie_word_embeddings"] = True
    artifact["config"]["target_modules"].append("lm_head")
    artifact["tensors"] |= artifact["head"]


@mutant("ML420", "I38", says="target_modules has lm_head, which the base keeps as one")
def head_of_a_tied_base_by_a_pattern(artifact: Artifact) -> None:
    """A pattern reaches the head, and the base ties it to the embeddings."""
    head_of_a_tied_base.change(artifact)
    artifact["config"]["target_modules"] = r".*\.self_attn\.(q|k|v|o)_proj|lm_head"


@mutant("ML423", "N48", says="still has the part")
def pissa_on_the_plain_base(artifact: Artifact) -> None:
    """The adapter was initialised by PiSSA, and is put on the base that still has its part."""
    artifact["config"]["init_lora_weights"] = "pissa_niter_16"


@mutant("ML423", "N48", says="still has the part")
def loftq_on_the_plain_base(artifact: Artifact) -> None:
    """The adapter is to make up for a base in four bits, and the base is in full precision."""
    artifact["config"] |= {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}


@mutant("ML425", "N37", says="language_model.layers.0.self_attn.k_proj.lora_A.weight")
def text_names_on_a_base_with_images(artifact: Artifact) -> None:
    """The adapter was trained on the text of a model with images: a server finds none of its names."""
    names = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    artifact["base_config"] = {**names, "text_config": artifact["base_config"], "vision_config": {}}
