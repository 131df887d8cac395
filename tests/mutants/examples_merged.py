"""The example of each rule of `merged`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

import mutants_merged_changes as changes
import mutants_merged_configuration as configuration
import mutants_merged_files as files
import torch
from bench_merged import HEAD, K1, NORM, Q1, changed
from gallery import Artifact, Example


class ML421(Example):
    mutant = files.quantised

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["quantization_config"] = None


class ML430(Example):
    mutant = changes.norm_changed

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][NORM] = artifact["before"][NORM].clone()


class ML431(Example):
    mutant = changes.garbage_of_the_right_size

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][Q1] = changed(artifact, Q1, 1.5)


class ML432(Example):
    mutant = changes.one_change_lost

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][K1] = changed(artifact, K1, 0.5)


class ML433(Example):
    mutant = changes.change_a_hundred_times_too_large

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][Q1] = changed(artifact, Q1, 1.5)


class ML434(Example):
    mutant = changes.half_of_the_scale

    def sound(self, artifact: Artifact) -> None:
        artifact["adapter_at_hand"] = True


class ML435(Example):
    mutant = configuration.rope_theta_lost

    def sound(self, artifact: Artifact) -> None:
        del artifact["config"]["rope_parameters"]
        artifact["config"]["rope_theta"] = 1_000_000


class ML436(Example):
    mutant = configuration.tied_by_the_configuration_alone

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["tie_word_embeddings"] = False


class ML437(Example):
    mutant = files.saved_in_another_dtype

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"] = {name: tensor.clone() for name, tensor in artifact["tensors"].items()}


class ML438(Example):
    mutant = changes.last_layer_is_the_base_s

    def sound(self, artifact: Artifact) -> None:
        artifact["adapter_at_hand"] = True


class ML439(Example):
    mutant = changes.low_rank_change_of_the_head

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][HEAD] = artifact["before"][HEAD].clone()


class ML440(Example):
    mutant = configuration.lower_case

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_config"]["padding_side"] = "left"


class ML441(Example):
    mutant = configuration.another_eos_token

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_config"]["pad_token"] = "[control_12]"


class ML442(Example):
    mutant = configuration.template_of_another_family

    def sound(self, artifact: Artifact) -> None:
        file = artifact["folder"] / "chat_template.jinja"
        file.write_text(file.read_text() + "\n")


class ML443(Example):
    mutant = files.consolidated_weights_of_the_base

    def sound(self, artifact: Artifact) -> None:
        files.write_consolidated(artifact, "tensors", dtype=torch.float64)
