"""Adapters whose configuration is not the one of their training."""

from __future__ import annotations

from bench_adapter import COMMIT
from gallery import Artifact, mutant
from mutants_adapter_names import tensors_of_one_target_missing


@mutant("ML404", "I61", says="rank 4")
def rank_edited(artifact: Artifact) -> None:
    """r was halved in the configuration, which doubles the scale."""
    artifact["config"]["r"] = 4


@mutant("ML404", says="rank 2")
def rank_pattern_of_another_rank(artifact: Artifact) -> None:
    """A pattern gives a layer another rank than its tensors have."""
    artifact["config"]["rank_pattern"] = {"layers.0.self_attn.q_proj": 2}


@mutant("ML409", "I50", says="rank_pattern has")
def rank_pattern_that_matches_nothing(artifact: Artifact) -> None:
    """A pattern names a layer that is not there."""
    artifact["config"]["rank_pattern"] = {"attn.q_proj": 8}


@mutant("ML408", says="more than 5 s")
def pattern_without_end(artifact: Artifact) -> None:
    """A pattern takes longer than the universe is old."""
    artifact["config"]["alpha_pattern"] = {r"([a-z._0-9]+)+#": 8}


@mutant("ML408", "I61", says="lora_alpha is 0")
def alpha_zero(artifact: Artifact) -> None:
    """The scale was not stored, and was read as 0."""
    artifact["config"]["lora_alpha"] = 0


@mutant("ML408", "I61", says="lora_alpha is missing")
def alpha_missing(artifact: Artifact) -> None:
    """The scale was not stored: PEFT takes 8."""
    del artifact["config"]["lora_alpha"]


@mutant("ML408", says='r is "8"')
def rank_is_text(artifact: Artifact) -> None:
    """The rank is a text."""
    artifact["config"]["r"] = "8"


@mutant("ML408", says="IA3")
def another_kind_of_adapter(artifact: Artifact) -> None:
    """The adapter is not LoRA's."""
    artifact["config"]["peft_type"] = "IA3"


@mutant("ML408", says="SEQ_CLS")
def adapter_for_another_task(artifact: Artifact) -> None:
    """The adapter classifies texts."""
    artifact["config"]["task_type"] = "SEQ_CLS"


@mutant("ML408", says="would import a module")
def configuration_that_imports(artifact: Artifact) -> None:
    """The configuration makes PEFT import a module of its choice."""
    artifact["config"] |= {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}


@mutant("ML408", says="target_modules is null")
def no_targets(artifact: Artifact) -> None:
    """The targets were not stored: PEFT takes q_proj and v_proj."""
    artifact["config"]["target_modules"] = None


@mutant("ML408", says="PEFT refuses it")
def settings_that_exclude_each_other(artifact: Artifact) -> None:
    """The configuration asks for what PEFT cannot do together."""
    artifact["config"]["exclude_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]


@mutant("ML401 ML409", "I50", says="'kproj', which matches nothing")
def typo_in_the_targets(artifact: Artifact) -> None:
    """One target has a typo, and PEFT took the others."""
    artifact["config"]["target_modules"] = ["q_proj", "kproj", "v_proj", "o_proj"]


@mutant("ML409", "I50", says="'kproj', which matches nothing")
def typo_in_training(artifact: Artifact) -> None:
    """One target had a typo in training, so that its layers have no tensors."""
    typo_in_the_targets.change(artifact)
    tensors_of_one_target_missing.change(artifact)


@mutant("ML409", "I50", says="modules_to_save has 'score'")
def saved_module_that_is_not_there(artifact: Artifact) -> None:
    """A module to be trained in full is not in the base."""
    artifact["config"]["modules_to_save"] = ["score"]


@mutant("ML409", "I50", says="layers_to_transform has 9")
def layer_that_is_not_there(artifact: Artifact) -> None:
    """The configuration names a layer beyond the last."""
    artifact["config"]["layers_to_transform"] = [0, 1, 9]


@mutant("ML410", "I19", says="'main' is not a pin")
def revision_is_a_branch(artifact: Artifact) -> None:
    """The revision is a branch."""
    artifact["config"]["revision"] = "main"


@mutant("ML410", "I19", says="not a pin")
def revision_is_a_tag(artifact: Artifact) -> None:
    """The revision is a tag."""
    artifact["config"]["revision"] = "v0.3"


@mutant("ML410", "I19", says="not a pin")
def revision_is_short(artifact: Artifact) -> None:
    """The revision is the beginning of a commit."""
    artifact["config"]["revision"] = COMMIT[:7]


@mutant("ML410", "I19", says="placeholder")
def revision_is_made_up(artifact: Artifact) -> None:
    """The revision is a commit that nobody made."""
    artifact["config"]["revision"] = "deadbeef" * 5


@mutant("ML410", "I19", says="base_model_name_or_path is null")
def base_not_named(artifact: Artifact) -> None:
    """Nothing names the base that it is for."""
    artifact["config"]["base_model_name_or_path"] = None


@mutant("ML411", "I19", says="not recorded")
def revision_not_recorded(artifact: Artifact) -> None:
    """PEFT recorded no revision, and no manifest does."""
    (artifact["folder"] / "manifest.json").unlink()
    artifact["config"] |= {"base_model_name_or_path": "mistralai/Mistral-7B-v0.3", "revision": None}


@mutant("ML422", says='a_key_of_tomorrow is {"x": 1}')
def key_that_nobody_knows(artifact: Artifact) -> None:
    """The configuration sets a key of a version of PEFT that is not out yet."""
    artifact["config"]["a_key_of_tomorrow"] = {"x": 1}


@mutant("ML422", says="aLoRA, which is on only after certain tokens")
def adapter_that_waits_for_tokens(artifact: Artifact) -> None:
    """The adapter is on only after certain tokens, which no server but one knows."""
    artifact["config"]["alora_invocation_tokens"] = [3, 4]


@mutant("ML408", says="init_lora_weights is")
def start_that_nobody_knows(artifact: Artifact) -> None:
    """The way in which the adapter was initialised is made up."""
    artifact["config"]["init_lora_weights"] = "svd"


@mutant("ML408", says="megatron_core is")
def module_named_by_the_file(artifact: Artifact) -> None:
    """The configuration names a module for PEFT to import, which it would do once another key is set."""
    artifact["config"]["megatron_core"] = "antigravity"


@mutant("ML408", says="r is 100000000000000000000")
def rank_of_another_world(artifact: Artifact) -> None:
    """The rank has 21 digits."""
    artifact["config"]["r"] = 10**20


@mutant("ML426", says="SGLang leaves out alpha_pattern, and scales it by 2")
def scale_that_a_server_does_not_read(artifact: Artifact) -> None:
    """One kind of layers has a scale of its own, which SGLang and an older vLLM leave out."""
    artifact["config"]["alpha_pattern"] = {"q_proj": artifact["config"]["lora_alpha"] / 2}


@mutant("ML426", "N204", says="SGLang leaves out use_rslora, and scales it by 2")
def rank_stabilised_scale(artifact: Artifact) -> None:
    """The scale is lora_alpha / sqrt(r), which SGLang does not know."""
    artifact["config"]["use_rslora"] = True
    # the tensors keep their strength: the same numbers are smaller by the root of the rank
    for name, one in artifact["tensors"].items():
        if "lora_B" in name:
            artifact["tensors"][name] = one / artifact["config"]["r"] ** 0.5


@mutant("ML404", "N43", says="rank_pattern is empty, and the tensors have the ranks 4, 8")
def rank_pattern_lost(artifact: Artifact) -> None:
    """One kind of layers was trained with a rank of its own, and the configuration lost it."""
    for name, one in artifact["tensors"].items():
        if "q_proj" in name:
            artifact["tensors"][name] = one[:4].clone() if "lora_A" in name else one[:, :4].clone()


@mutant("ML426", says="bias is 'lora_only'")
def trained_biases(artifact: Artifact) -> None:
    """The configuration trains biases, which servers do not load."""
    artifact["config"]["bias"] = "lora_only"


@mutant("ML410", says="is not a pin")
def revision_of_another_type(artifact: Artifact) -> None:
    """The revision is a list."""
    artifact["config"]["revision"] = ["main"]
