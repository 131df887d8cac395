"""The example of each rule of `adapter`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

import shutil

import mutants_adapter_bases as bases
import mutants_adapter_classes as classes
import mutants_adapter_configuration as configuration
import mutants_adapter_names as names
import mutants_adapter_numbers as numbers
import mutants_adapter_origins as origins
from bench_adapter import NAMES, TEXT_PATTERN, of_class
from gallery import Artifact, Example
from of_classes import made_adapter

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS


class ML401(Example):
    mutant = names.tensors_of_one_target_missing

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"] = {name: tensor.clone() for name, tensor in artifact["tensors"].items()}


class ML402(Example):
    mutant = numbers.infinite_in_half_precision

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][artifact["layer"]] = artifact["tensors"][artifact["layer"]] / 2


class ML403(Example):
    mutant = numbers.loaded_frozen

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"] = {name: tensor.clone() for name, tensor in artifact["tensors"].items()}


class ML404(Example):
    mutant = configuration.rank_edited

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["r"] = 8


class ML405(Example):
    def broken(self, artifact: Artifact) -> None:
        (artifact["folder"] / "adapter_model.safetensors").unlink()

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"] / "README.md").write_text("An adapter for answers about France.")


class ML406(Example):
    def broken(self, artifact: Artifact) -> None:
        (artifact["folder"] / "adapter_model.bin").write_bytes(b"PK")

    def sound(self, artifact: Artifact) -> None:
        # the trainer's own, no weights
        (artifact["folder"] / "training_args.bin").write_bytes(b"PK")


class ML407(Example):
    mutant = names.prefix_missing

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"] = {name: tensor.clone() for name, tensor in artifact["tensors"].items()}


class ML408(Example):
    mutant = configuration.alpha_zero

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["lora_alpha"] = 16


class ML409(Example):
    mutant = configuration.typo_in_the_targets

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]


class ML410(Example):
    mutant = configuration.revision_is_a_branch

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["revision"] = "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db"


class ML411(Example):
    mutant = configuration.revision_not_recorded

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"] / "manifest.json").unlink()
        artifact["config"]["revision"] = "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db"


class ML412(Example):
    mutant = bases.base_of_another_size

    def sound(self, artifact: Artifact) -> None:
        artifact["base_config"] |= {"hidden_size": 128, "num_hidden_layers": 2}


class ML413(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["tensors"] = {name: tensor * 1e-12 for name, tensor in artifact["tensors"].items()}

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"] = {name: tensor * 0.9 for name, tensor in artifact["tensors"].items()}


class ML414(Example):
    mutant = numbers.tensors_quantised

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"] = {name: tensor.bfloat16() for name, tensor in artifact["tensors"].items()}


class ML415(Example):
    mutant = numbers.dtypes_mixed

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"] = {name: tensor.bfloat16() for name, tensor in artifact["tensors"].items()}


class ML416(Example):
    mutant = numbers.numbers_of_a_diverged_run

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][artifact["layer"]] = artifact["tensors"][artifact["layer"]] * 2


class ML417(Example):
    mutant = numbers.layers_all_alike

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"] = {name: tensor.clone() for name, tensor in artifact["tensors"].items()}


class ML418(Example):
    def broken(self, artifact: Artifact) -> None:
        (artifact["folder"] / "model.safetensors").touch()

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"] / "README.md").touch()


class ML419(Example):
    mutant = bases.base_with_an_adapter

    def sound(self, artifact: Artifact) -> None:
        (artifact["base"] / "README.md").write_text("The base.")


class ML420(Example):
    mutant = bases.head_of_a_tied_base

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["target_modules"] += ["lm_head"]
        artifact["tensors"] |= artifact["head"]


class ML422(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["config"]["kasa_config"] = {"beta": 0.0001}

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["kasa_config"] = None


class ML423(Example):
    mutant = bases.pissa_on_the_plain_base

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["init_lora_weights"] = True


class ML424(Example):
    mutant = numbers.layer_that_hardly_moved

    def sound(self, artifact: Artifact) -> None:
        for name, tensor in artifact["tensors"].items():
            tensor.div_(1000 if "lora_B" in name else 1)


class ML425(Example):
    mutant = bases.text_names_on_a_base_with_images

    def sound(self, artifact: Artifact) -> None:
        of_class(artifact, made_adapter("wrapped-mistral", TEXT_PATTERN))


class ML426(Example):
    mutant = configuration.scale_that_a_server_does_not_read

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["alpha_pattern"] = {}


class ML427(Example):
    mutant = classes.layer_that_vllm_never_calls

    def sound(self, artifact: Artifact) -> None:
        kinds = (one for one in TEXT_MODELS["mistral4"].attention if one != "kv_b_proj")
        of_class(artifact, made_adapter("mistral4", tuple(kinds)))


class ML450(Example):
    mutant = classes.last_names_reach_the_vision_tower

    def sound(self, artifact: Artifact) -> None:
        of_class(artifact, made_adapter("wrapped-mistral", TEXT_PATTERN))


class ML451(Example):
    mutant = classes.pattern_that_reaches_one_kind

    def sound(self, artifact: Artifact) -> None:
        of_class(artifact, made_adapter("mistral", r".*\.self_attn\.(q|k|v|o)_proj"))


class ML452(Example):
    mutant = classes.router_is_adapted

    def sound(self, artifact: Artifact) -> None:
        of_class(artifact, made_adapter("mixtral", NAMES))


class ML453(Example):
    mutant = classes.experts_are_adapted

    def sound(self, artifact: Artifact) -> None:
        of_class(artifact, made_adapter("mixtral", NAMES))


class ML454(Example):
    mutant = classes.adapter_of_a_dense_model_on_experts

    def sound(self, artifact: Artifact) -> None:
        of_class(artifact, made_adapter("mistral", ("q_proj", "gate_proj", "up_proj", "down_proj")))


class ML428(Example):
    mutant = origins.alpha_multiplied_once_more

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["lora_alpha"] = 256


class ML429(Example):
    mutant = origins.base_of_another_version

    def sound(self, artifact: Artifact) -> None:
        origins.without_manifest(artifact, "mistralai/Mistral-7B-v0.3")


class ML455(Example):
    mutant = origins.run_that_went_on

    def sound(self, artifact: Artifact) -> None:
        last = origins.checkpoint(artifact, 1000, top=500)
        shutil.copy(artifact["folder"] / "adapter_model.safetensors", last / "adapter_model.safetensors")


class ML456(Example):
    mutant = origins.adapter_dropped_for_a_new_one

    def sound(self, artifact: Artifact) -> None:
        origins.goes_on(artifact, "right")
