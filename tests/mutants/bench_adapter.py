"""Adapter folders that are broken on purpose."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from gallery import Artifact, mutant
from of_classes import MadeAdapter, made_adapter, tiny_base
from safetensors.torch import load_file, save_file
from trained import WEIGHTS, copied, trained

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS
from pytest_mistral_lora.conformance.checks import Settings, collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.model_targets import AdapterTarget

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.lm_head."
COMMIT = "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db"


class AdapterBench:
    """Makes a trained adapter with its base, and judges its folder."""

    subject = "adapter"

    def make(self, folder: Path) -> Artifact:
        """Make a trained adapter and its base below a folder."""
        source = trained()
        adapter, base = folder / "lora", folder / "base"
        for one, target in ((source.adapter, adapter), (source.base, base)):
            copied(one, target)
        return {
            "folder": adapter,
            "config": json.loads((adapter / CONFIG).read_text()),
            # copies: those of load_file are the file itself, which a change may cut off
            "tensors": {name: tensor.clone() for name, tensor in load_file(adapter / TENSORS).items()},
            "layer": LAYER,
            "head": _head(),
            "base": base,
            "base_config": json.loads((base / "config.json").read_text()),
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Run every check of the subject on the adapter's folder."""
        torch.set_num_threads(1)  # the tiny model is too small to share
        folder, base = artifact["folder"], artifact["base"]
        _write_changed(artifact["config"], folder / CONFIG)
        _write_changed(artifact["base_config"], base / "config.json")
        _write_tensors(artifact["tensors"], folder / TENSORS)
        # with its rows, as a recipe's own output: the base's tokenizer is not judged once more
        targets = [AdapterTarget("lora", folder, base=base, dataset=(trained().rows,))]
        checks = [check for check in collect(targets, settings(folder)) if check.subject == self.subject]
        return [finding for check in checks for finding in check.run().findings]


BENCH = AdapterBench()


def settings(folder: Path, *, require_manifest: bool = False) -> Settings:
    """What the suite would know of a run."""
    return Settings(20, None, "cpu", True, (), False, folder, require_manifest)


def _head() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        f"{HEAD}lora_A.weight": torch.randn(8, 128, generator=random) / 100,
        f"{HEAD}lora_B.weight": torch.randn(32768, 8, generator=random) / 100,
    }


def _write_changed(data: object, file: Path) -> None:
    if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1 and file.stat().st_size < 1 << 20:
        try:
            unchanged = json.loads(file.read_text()) == data or _BROKEN in file.read_text()
        except ValueError:
            unchanged = True
        if not unchanged:
            file.write_text(json.dumps(data))


_BROKEN = "left as it is"


def _write_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    before = load_file(trained().adapter / TENSORS)
    same = before.keys() == tensors.keys() and all(
        before[name].dtype == tensor.dtype and torch.equal(before[name], tensor) for name, tensor in tensors.items()
    )
    if not same:
        file.unlink()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def _renamed(artifact: Artifact, rename: Callable[[str], str]) -> None:
    artifact["tensors"] = {rename(name): tensor for name, tensor in artifact["tensors"].items()}


@mutant("ML405", says="no such file")
def no_configuration(artifact: Artifact) -> None:
    """There is no adapter_config.json."""
    (artifact["folder"] / CONFIG).unlink()


@mutant("ML405", "I16", says="cut off")
def tensors_cut_off(artifact: Artifact) -> None:
    """The copy of the tensors ended early."""
    file = artifact["folder"] / TENSORS
    file.write_bytes(file.read_bytes()[:-1000])


@mutant("ML405", "I16", says="0 bytes")
def tensors_of_no_bytes(artifact: Artifact) -> None:
    """adapter_model.safetensors is an empty file."""
    (artifact["folder"] / TENSORS).write_bytes(b"")


@mutant("ML401", "I16", says="no tensors")
def no_tensors(artifact: Artifact) -> None:
    """The tensors were filtered away when the adapter was saved: a sound file of 40 bytes."""
    artifact["tensors"].clear()


@mutant("ML405", says="is a directory")
def tensors_are_a_folder(artifact: Artifact) -> None:
    """adapter_model.safetensors is a folder."""
    (artifact["folder"] / TENSORS).unlink()
    (artifact["folder"] / TENSORS).mkdir()


@mutant("ML405", says="header")
def header_without_end(artifact: Artifact) -> None:
    """The file says that its header has 2 ** 62 bytes."""
    (artifact["folder"] / TENSORS).write_bytes((1 << 62).to_bytes(8, "little") + b"{}" + bytes(100))


def _safetensors(file: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@mutant("ML405", says="16 bytes for F32 [1000000, 1000000]")
def header_that_lies_about_a_size(artifact: Artifact) -> None:
    """The header says a tensor of terabytes, with sixteen bytes of data."""
    entry = {"dtype": "F32", "shape": [1_000_000, 1_000_000], "data_offsets": [0, 16]}
    _safetensors(artifact["folder"] / TENSORS, {LAYER: entry}, bytes(16))


@mutant("ML405", says="overlap")
def tensors_that_overlap(artifact: Artifact) -> None:
    """Two tensors are the same bytes of the file."""
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    _safetensors(artifact["folder"] / TENSORS, {LAYER: entry, f"{LAYER}2": entry}, bytes(16))


@mutant("ML405", says="nested too deeply")
def header_nested_without_end(artifact: Artifact) -> None:
    """The header is a million opening brackets."""
    text = b"[" * 1_000_000
    (artifact["folder"] / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text)


@mutant("ML405", says="leads out of the folder")
def tensors_linked_from_elsewhere(artifact: Artifact) -> None:
    """adapter_model.safetensors is a link to another folder."""
    file = artifact["folder"] / TENSORS
    outside = Path(file.rename(artifact["folder"].parent / "elsewhere.safetensors"))
    file.symlink_to(outside)


@mutant("ML405", says="leads nowhere")
def tensors_linked_to_nothing(artifact: Artifact) -> None:
    """adapter_model.safetensors is a link to itself."""
    (artifact["folder"] / TENSORS).unlink()
    (artifact["folder"] / TENSORS).symlink_to(TENSORS)


@mutant("ML405", says="not valid JSON")
def configuration_not_in_utf_8(artifact: Artifact) -> None:
    """adapter_config.json has a byte that is no UTF-8."""
    (artifact["folder"] / CONFIG).write_bytes(b'{"r": "\xff"}')


@mutant("ML405", says="a JSON list")
def configuration_is_a_list(artifact: Artifact) -> None:
    """adapter_config.json is a list."""
    file = artifact["folder"] / CONFIG
    file.write_text(json.dumps([_BROKEN]))


@mutant("ML405", says="name that folder")
def adapter_of_another_name(artifact: Artifact) -> None:
    """PEFT saved an adapter that is not called `default` one folder below."""
    folder = artifact["folder"]
    (folder / "mine").mkdir()
    for name in (CONFIG, TENSORS):
        (folder / name).rename(folder / "mine" / name)


@mutant("ML405", says="sharded")
def adapter_in_shards(artifact: Artifact) -> None:
    """The adapter was split into shards, which PEFT does not load."""
    folder = artifact["folder"]
    (folder / TENSORS).rename(folder / "adapter_model-00001-of-00001.safetensors")


@mutant("ML405 ML406", says="pickle")
def weights_in_a_pickle_alone(artifact: Artifact) -> None:
    """The adapter is a pickle, and there are no safetensors."""
    (artifact["folder"] / TENSORS).unlink()
    (artifact["folder"] / "adapter_model.bin").write_bytes(pickle.dumps({}))


@mutant("ML406", says="adapter.pt")
def weights_in_a_pickle_too(artifact: Artifact) -> None:
    """There is a pickle beside the safetensors."""
    (artifact["folder"] / "adapter.pt").write_bytes(pickle.dumps({}))


@mutant("ML406", says="under the name of safetensors")
def pickle_named_safetensors(artifact: Artifact) -> None:
    """adapter_model.safetensors is a pickle."""
    (artifact["folder"] / TENSORS).write_bytes(pickle.dumps({"a": [1]}))


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


@mutant("ML401 ML412", "I38", says="shape (8, 128)")
def base_of_another_size(artifact: Artifact) -> None:
    """The base has wider and fewer layers than the one that was trained."""
    artifact["base_config"] |= {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 1}


@mutant("ML413", "I61", says="changes no logit")
def scale_of_almost_nothing(artifact: Artifact) -> None:
    """The scale is so small that no logit moves."""
    artifact["config"]["lora_alpha"] = 1e-12


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


@mutant("ML405", says="nested too deeply")
def configuration_nested_too_deeply(artifact: Artifact) -> None:
    """A value is a list in a list, a hundred times."""
    (artifact["folder"] / CONFIG).write_text(f'{{"{_BROKEN}": {"[" * 100}{"]" * 100}}}')


@mutant("ML405 ML418", says="full model weights")
def full_weights_and_half_an_adapter(artifact: Artifact) -> None:
    """The folder holds a full model, and the configuration of an adapter without its tensors."""
    folder = artifact["folder"]
    artifact["config"]["revision"] = COMMIT  # which the manifest records
    for name in (TENSORS, "manifest.json"):
        (folder / name).unlink()
    copied(artifact["base"], folder / "base")
    (folder / "base" / WEIGHTS).rename(folder / WEIGHTS)


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


@mutant("ML426", says="it scales model.layers.0.self_attn.q_proj by 2, and PEFT by 1")
def scale_that_a_server_does_not_read(artifact: Artifact) -> None:
    """One kind of layers has a scale of its own, which vLLM leaves out."""
    artifact["config"]["alpha_pattern"] = {"q_proj": artifact["config"]["lora_alpha"] / 2}


@mutant("ML404", "N43", says="rank_pattern is empty, and the tensors have the ranks 4, 8")
def rank_pattern_lost(artifact: Artifact) -> None:
    """One kind of layers was trained with a rank of its own, and the configuration lost it."""
    for name, one in artifact["tensors"].items():
        if "q_proj" in name:
            artifact["tensors"][name] = one[:4].clone() if "lora_A" in name else one[:, :4].clone()


NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT_PATTERN = r".*\.self_attn\.(q_a|q_b|kv_b|o)_proj"
USUAL_PATTERN = r".*\.layers\.\d+\.(mlp|self_attn)\.(up|down|gate|q|k|v|o)_proj"
TEXT_PATTERN = r"model\.language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
EXPERTS = "ML426 ML453" if hasattr(transformers, "TokenizersBackend") else "ML453"
"""What fires on adapted experts: from transformers 5 on, they are parameters, which servers read in other layouts."""


def of_class(artifact: Artifact, made: MadeAdapter, base: Path | None = None) -> None:
    """Put an adapter that PEFT wrote, and its base or another one, in the place of the trained ones."""
    shutil.rmtree(artifact["base"])
    shutil.copytree(base or made.base, artifact["base"])
    for name in (CONFIG, TENSORS):
        (artifact["folder"] / name).unlink()
        shutil.copy(made.adapter / name, artifact["folder"] / name)
    artifact["config"] = json.loads((artifact["folder"] / CONFIG).read_text())
    artifact["tensors"] = {name: one.clone() for name, one in load_file(artifact["folder"] / TENSORS).items()}
    artifact["base_config"] = json.loads((artifact["base"] / "config.json").read_text())


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
