"""Checkpoint folders whose configurations describe two models, or have a key that their class does not read."""

from __future__ import annotations

import json
from typing import Any

from gallery import Artifact, mutant
from ministral_3 import ROPE


def take_ministral_3(artifact: Artifact) -> None:
    """Make the folder that of a model with scaled queries, in both formats of its configuration."""
    artifact["config"] |= {"model_type": "ministral3", "rope_parameters": dict(ROPE), "num_hidden_layers": 34}
    write_params(artifact)


def write_params(artifact: Artifact, **values: Any) -> None:
    """Write Mistral's own configuration of the same model, with these values changed."""
    yarn = {"factor": 16.0, "beta": 32.0, "alpha": 1.0, "original_max_position_embeddings": 16384, "apply_scale": False}
    params = {
        "n_layers": 34,
        "vocab_size": artifact["config"]["vocab_size"],
        "rope_theta": 1_000_000.0,
        "yarn": yarn | values.pop("yarn", {}),
        "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 16384} | values.pop("llama_4_scaling", {}),
    }
    (artifact["folder"] / "params.json").write_text(json.dumps(params | values))


@mutant("ML243", "N200", says="yarn.apply_scale is true: cosine and sine are multiplied by 1.277")
def attention_is_scaled_in_one_format(artifact: Artifact) -> None:
    """A server of Mistral's format multiplies cosine and sine, and transformers does not."""
    take_ministral_3(artifact)
    write_params(artifact, yarn={"apply_scale": True})


@mutant("ML243", "N201", says="yarn.apply_scale is false: cosine and sine are multiplied by 1")
def multiplier_of_all_dimensions_is_zero(artifact: Artifact) -> None:
    """config.json has mscale_all_dim 0, with which transformers multiplies cosine and sine."""
    take_ministral_3(artifact)
    artifact["config"]["rope_parameters"]["mscale_all_dim"] = 0.0


@mutant("ML243", says="rope_theta is 10000")
def base_of_another_model(artifact: Artifact) -> None:
    """params.json has another base of the rotary embedding."""
    take_ministral_3(artifact)
    write_params(artifact, rope_theta=10_000.0)


@mutant("ML243", says="yarn is missing")
def scaling_in_config_alone(artifact: Artifact) -> None:
    """params.json scales nothing."""
    take_ministral_3(artifact)
    params = json.loads((artifact["folder"] / "params.json").read_text())
    del params["yarn"]
    (artifact["folder"] / "params.json").write_text(json.dumps(params))


@mutant("ML243", says="yarn is given")
def scaling_in_params_alone(artifact: Artifact) -> None:
    """config.json lost the scaling when the model was saved."""
    write_params(artifact, n_layers=32, llama_4_scaling={"beta": 0})


@mutant("ML243", says="llama_4_scaling.beta is 0.3")
def queries_scaled_otherwise(artifact: Artifact) -> None:
    """params.json scales queries by another factor of their position."""
    take_ministral_3(artifact)
    write_params(artifact, llama_4_scaling={"beta": 0.3})


@mutant("ML243", says="llama_4_scaling.original_max_position_embeddings is 8192")
def queries_scaled_from_elsewhere(artifact: Artifact) -> None:
    """params.json scales queries from another position on."""
    take_ministral_3(artifact)
    write_params(artifact, llama_4_scaling={"original_max_position_embeddings": 8192})


@mutant("ML243", says="yarn.original_max_position_embeddings is 8192")
def length_before_scaling(artifact: Artifact) -> None:
    """params.json has another length before scaling."""
    take_ministral_3(artifact)
    write_params(artifact, yarn={"original_max_position_embeddings": 8192})


@mutant("ML243", says="n_layers is 36")
def layers_of_another_model(artifact: Artifact) -> None:
    """params.json is another model's."""
    take_ministral_3(artifact)
    write_params(artifact, n_layers=36)


@mutant("ML243", says="vocab_size is 32768")
def vocabulary_of_another_model(artifact: Artifact) -> None:
    """params.json has another vocabulary."""
    take_ministral_3(artifact)
    write_params(artifact, vocab_size=32768)


@mutant("ML243", says="tied_embeddings is true")
def tie_in_one_format(artifact: Artifact) -> None:
    """params.json ties the head, and config.json does not."""
    take_ministral_3(artifact)
    artifact["config"]["tie_word_embeddings"] = False
    write_params(artifact, tied_embeddings=True)


@mutant("ML243", says="sliding_window is 4096")
def window_in_one_format(artifact: Artifact) -> None:
    """params.json has a window of attention, and config.json has none."""
    take_ministral_3(artifact)
    artifact["config"]["sliding_window"] = None
    write_params(artifact, sliding_window=4096)


@mutant("ML243", says="rope_scaling.factor is 8")
def two_spellings_of_a_factor(artifact: Artifact) -> None:
    """A tool wrote the older spelling beside the newer one, with another factor."""
    take_ministral_3(artifact)
    artifact["config"]["rope_scaling"] = {**ROPE, "factor": 8.0}
    (artifact["folder"] / "params.json").unlink()


@mutant("ML244", "N202", says="rope_parameters.llama_4_scaling_beta is 0.1: MistralForCausalLM")
def class_without_scaled_queries(artifact: Artifact) -> None:
    """The class is the older Mistral, which does not scale queries."""
    take_ministral_3(artifact)
    artifact["config"]["model_type"] = "mistral"


@mutant("ML244", "N202", says="text_config.rope_scaling.llama_4_scaling_beta is 0.1: MistralForCausalLM")
def wrapped_class_without_scaled_queries(artifact: Artifact) -> None:
    """A wrapper around the older Mistral, with the keys of a Devstral Small 2."""
    config = artifact["config"]
    artifact["config"] = {
        "model_type": "mistral3",
        "vision_config": {},
        "text_config": {**config, "model_type": "mistral", "rope_scaling": dict(ROPE)},
    }


@mutant("ML244", says="llama_4_scaling.beta is 0.1: Ministral3ForCausalLM")
def name_that_no_class_reads(artifact: Artifact) -> None:
    """The scaling of queries has the name that params.json has for it."""
    take_ministral_3(artifact)
    del artifact["config"]["rope_parameters"]["llama_4_scaling_beta"]
    artifact["config"]["llama_4_scaling"] = {"beta": 0.1, "original_max_position_embeddings": 16384}
    (artifact["folder"] / "params.json").unlink()


@mutant("ML244", says="sliding_window is 4096: LlamaForCausalLM")
def window_of_a_class_without_one(artifact: Artifact) -> None:
    """A Mistral with a window was converted to a Llama, which has none."""
    artifact["config"] |= {"model_type": "llama", "sliding_window": 4096, "max_position_embeddings": 32768}
