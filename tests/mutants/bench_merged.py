"""Merged models that PEFT made, and that are broken on purpose."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from converted import converted_tokenizer
from gallery import Artifact, mutant
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trained import WEIGHTS, copied
from transformers import MistralConfig, MistralForCausalLM

from pytest_mistral_lora.conformance.checks import Settings, collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.named_targets import named_targets

RANK, LAYERS = 4, 3
Q1 = "model.layers.1.self_attn.q_proj.weight"
K1 = "model.layers.1.self_attn.k_proj.weight"
HEAD, EMBEDDINGS, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@cache
def plain_merge() -> Path:
    """A tiny base in bfloat16 with its tokenizer, an adapter of it, and what `merge_and_unload` makes of the two."""
    folder = Path(tempfile.mkdtemp(prefix="merged-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fast = converted_tokenizer("spm-v3").fast
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": None}
    config = MistralConfig(vocab_size=len(fast), architectures=["MistralForCausalLM"], **sizes, **heads)
    random = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        MistralForCausalLM(config).bfloat16().save_pretrained(folder / "base")
        model = MistralForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
        settings = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=8, target_modules=targets)
        adapted = get_peft_model(model, settings)
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.02, generator=random)
        adapted.save_pretrained(folder / "lora")
        adapted.merge_and_unload().save_pretrained(folder / "merged")
    for one in ("base", "merged"):
        fast.save_pretrained(folder / one)
    return folder


class MergedBench:
    """Makes a base, an adapter and the merged model, and judges the merged model."""

    subject = "merged"

    def make(self, folder: Path) -> Artifact:
        """Copy base, adapter and merged model below a folder."""
        source = plain_merge()
        for name in ("base", "lora", "merged"):
            copied(source / name, folder / name)
        merged = folder / "merged"
        return {
            "folder": merged,
            "base": folder / "base",
            "adapter": folder / "lora",
            "adapter_at_hand": False,
            "config": json.loads((merged / "config.json").read_text()),
            "tokenizer_config": json.loads((merged / "tokenizer_config.json").read_text()),
            "tensors": {name: tensor.clone() for name, tensor in load_file(merged / WEIGHTS).items()},
            "before": load_file(source / "base" / WEIGHTS),
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Run every check of the subject on the merged model."""
        torch.set_num_threads(1)
        folder = artifact["folder"]
        for key, name in (("config", "config.json"), ("tokenizer_config", "tokenizer_config.json")):
            if json.loads((folder / name).read_text()) != artifact[key]:
                (folder / name).write_text(json.dumps(artifact[key]))
        unchanged = load_file(plain_merge() / "merged" / WEIGHTS)
        tensors = artifact["tensors"]
        if tensors.keys() != unchanged.keys() or any(
            tensor.dtype != unchanged[name].dtype or not torch.equal(tensor, unchanged[name])
            for name, tensor in tensors.items()
        ):
            (folder / WEIGHTS).unlink(missing_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        adapters = [folder, *([artifact["adapter"]] if artifact["adapter_at_hand"] else [])]
        targets = named_targets(adapters=adapters, base=artifact["base"])[:1]
        settings = Settings(20, None, "cpu", True, (), False, folder)
        checks = [check for check in collect(targets, settings) if check.subject in (self.subject, "adapter")]
        return [finding for check in checks for finding in check.run().findings]


BENCH = MergedBench()


def changed(artifact: Artifact, name: str, factor: float) -> torch.Tensor:
    """Return the base's tensor with a multiple of the change that was merged."""
    before, after = artifact["before"][name].float(), artifact["tensors"][name].float()
    return (before + factor * (after - before)).bfloat16()


def random_like(tensor: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Return random numbers of a tensor's size and scale."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(tensor.shape, generator=random) * tensor.float().std()).to(tensor.dtype)


@mutant("ML413", "I61", "N40", says="nothing was merged")
def merged_is_the_base(artifact: Artifact) -> None:
    """LoRA was stripped when the model was saved: every weight is the base's."""
    artifact["tensors"] = {name: tensor.clone() for name, tensor in artifact["before"].items()}


@mutant("ML413", says="nothing was merged")
def merged_is_the_base_in_another_dtype(artifact: Artifact) -> None:
    """Every weight is the base's, rounded to float16."""
    artifact["tensors"] = {name: tensor.half().bfloat16() for name, tensor in artifact["before"].items()}


@mutant("ML413", says="the file is the base's, and vLLM loads it")
def consolidated_file_of_the_base(artifact: Artifact) -> None:
    """The merge was written into a copy of the base's folder, in which Mistral's own file is the base's still."""
    for one in ("folder", "base"):
        save_file(artifact["before"], artifact[one] / "consolidated.safetensors")


@mutant("ML412", says="model.embed_tokens.weight of the base is missing")
def names_of_another_library(artifact: Artifact) -> None:
    """The names have another prefix, so that no layer can be compared with the base's."""
    artifact["tensors"] = {
        name.replace("model.", "transformer."): tensor for name, tensor in artifact["tensors"].items()
    }


@mutant("ML402", "I46", says=f"{Q1} is not finite")
def weight_not_finite(artifact: Artifact) -> None:
    """A merged weight has a NaN."""
    artifact["tensors"][Q1][3, 5] = torch.nan


@mutant("ML402", "I46", says=f"{EMBEDDINGS} is not finite")
def embedding_infinite(artifact: Artifact) -> None:
    """A number of the embeddings is infinite."""
    artifact["tensors"][EMBEDDINGS][7, 0] = torch.inf


@mutant("ML405", "I16", says="cut off")
def weights_cut_off(artifact: Artifact) -> None:
    """The copy of the weights ended early."""
    file = artifact["folder"] / WEIGHTS
    data = file.read_bytes()[:-100]
    file.unlink()
    file.write_bytes(data)


@mutant("ML405", says="of 2 shards")
def shards_without_an_index(artifact: Artifact) -> None:
    """The index of a sharded model was not copied."""
    shard(artifact)


@mutant("ML405", says="model-00001-of-00002.safetensors")
def index_of_other_shards(artifact: Artifact) -> None:
    """The index names another shard for a tensor than the one that holds it."""
    index = shard(artifact)
    index["weight_map"][Q1] = "model-00003-of-00003.safetensors"
    (artifact["folder"] / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def shard(artifact: Artifact) -> dict[str, dict[str, str]]:
    """Write the weights as two shards, and return their index."""
    folder, names = artifact["folder"], sorted(artifact["tensors"])
    (folder / WEIGHTS).unlink()
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: artifact["tensors"][name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    # the bench writes the tensors only if they differ from those of the merge
    return {"weight_map": where}


@mutant("ML412", says=f"{K1} of the base is missing")
def tensor_missing(artifact: Artifact) -> None:
    """A tensor of the base was not saved."""
    del artifact["tensors"][K1]


@mutant("ML412", says="q_proj.base_layer.weight is not in the base")
def saved_without_unload(artifact: Artifact) -> None:
    """The model was saved with PEFT's wrappers in its names."""
    artifact["tensors"][Q1.replace(".weight", ".base_layer.weight")] = artifact["tensors"].pop(Q1)


@mutant("ML412 ML435", "I38", says="lm_head.weight has shape")
def head_resized(artifact: Artifact) -> None:
    """The head has more rows than the configuration's vocabulary."""
    artifact["tensors"][HEAD] = torch.cat([artifact["tensors"][HEAD], artifact["tensors"][HEAD][:2]])


@mutant("ML418", "I61", says="once more")
def adapter_left_beside(artifact: Artifact) -> None:
    """The folder has a manifest of a merged model, and the adapter, which transformers puts on it again."""
    from trained import trained

    # a folder with both is taken for a merged model by its manifest alone
    for file in artifact["folder"].iterdir():
        file.unlink()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained().adapter / name, artifact["folder"] / name)
    for file in trained().merged.iterdir():
        if file.is_file():
            shutil.copy(file, artifact["folder"] / file.name)
    artifact["base"] = trained().base
    artifact["config"] = json.loads((artifact["folder"] / "config.json").read_text())
    artifact["tokenizer_config"] = json.loads((artifact["folder"] / "tokenizer_config.json").read_text())
    artifact["tensors"] = load_file(plain_merge() / "merged" / WEIGHTS)


@mutant("ML421", "I15", says="quantised")
def quantised(artifact: Artifact) -> None:
    """The adapter was merged into quantised weights."""
    artifact["config"]["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}


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


@mutant("ML405", "N40", says="holds no tensor")
def no_tensor_at_all(artifact: Artifact) -> None:
    """The weights were not gathered before the save."""
    artifact["tensors"] = {}


@mutant("ML435", "N59", says="eos_token_id is [3]")
def another_eos_at_generation(artifact: Artifact) -> None:
    """generation_config.json, which decides where an answer ends, has another EOS than the base's."""
    file = artifact["folder"] / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 3}))


@mutant("ML435", "N59", says="is missing: eos_token_id is [2], of config.json")
def ends_of_generation_lost(artifact: Artifact) -> None:
    """generation_config.json, in which the base has a second EOS, was not saved."""
    (artifact["folder"] / "generation_config.json").unlink()
    file = artifact["base"] / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 3]}))


@mutant("ML442", "N46", says="there is a tokenizer, and no chat template")
def template_lost(artifact: Artifact) -> None:
    """The tokenizer was saved without its chat template."""
    (artifact["folder"] / "chat_template.jinja").unlink()


@mutant("ML435", "N59", says="rope_theta is 10000.0, the default: the key is missing")
def rope_theta_lost(artifact: Artifact) -> None:
    """rope_theta was lost when the model was saved."""
    artifact["config"]["rope_parameters"] = {"rope_type": "default"}


@mutant("ML435", "N59", says="rms_norm_eps is 1e-05")
def another_eps(artifact: Artifact) -> None:
    """rms_norm_eps is another."""
    artifact["config"]["rms_norm_eps"] = 1e-5


@mutant("ML435", says="attention_bias is True")
def biases_for_servers(artifact: Artifact) -> None:
    """attention_bias, which transformers does not read for this class, and vLLM does."""
    artifact["config"]["attention_bias"] = True


@mutant("ML435", "I57", says="sliding_window is 4096")
def window_lost(artifact: Artifact) -> None:
    """sliding_window is missing: transformers takes 4,096."""
    del artifact["config"]["sliding_window"]


@mutant("ML435", "N59", says="num_attention_heads is 2")
def other_heads(artifact: Artifact) -> None:
    """The same matrices are cut into fewer, wider heads."""
    artifact["config"] |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@mutant("ML435", says="the architecture is MistralForSequenceClassification")
def another_architecture(artifact: Artifact) -> None:
    """The configuration names another class."""
    artifact["config"]["architectures"] = ["MistralForSequenceClassification"]


@mutant("ML435", says="eos_token_id is [5]")
def another_eos_in_the_configuration(artifact: Artifact) -> None:
    """eos_token_id is another: answers do not end."""
    artifact["config"]["eos_token_id"] = 5


@mutant("ML436", "N71", says="tie_word_embeddings is true, and lm_head.weight is not model.embed_tokens.weight")
def tied_by_the_configuration_alone(artifact: Artifact) -> None:
    """The configuration has a tie, and the file has a head of its own."""
    artifact["config"]["tie_word_embeddings"] = True


@mutant("ML412 ML436", "N71", says="the file has no lm_head.weight")
def head_lost(artifact: Artifact) -> None:
    """The head was not saved, and nothing ties it."""
    del artifact["tensors"][HEAD]


@mutant("ML437", says="BF16")
def saved_in_another_dtype(artifact: Artifact) -> None:
    """The merged model was saved in float32."""
    artifact["tensors"] = {name: tensor.float() for name, tensor in artifact["tensors"].items()}


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


def low_rank_head(artifact: Artifact) -> torch.Tensor:
    """Return the base's head with LoRA merged into it."""
    random = torch.Generator().manual_seed(2)
    before = artifact["before"][HEAD].float()
    b, a = torch.randn(before.shape[0], RANK, generator=random), torch.randn(RANK, before.shape[1], generator=random)
    return (before + b @ a / 200).bfloat16()


@mutant("ML440", says="gets other ids than the base's")
def lower_case(artifact: Artifact) -> None:
    """The tokenizer writes every letter in lower case."""
    edit_tokenizer(artifact, lambda data: data.update(normalizer={"type": "Lowercase"}))


@mutant("ML440", says="every text is cut")
def truncation_of_training(artifact: Artifact) -> None:
    """The truncation of a training run was saved with the tokenizer."""
    value = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    edit_tokenizer(artifact, lambda data: data.update(truncation=value))


@mutant("ML440", says="have another id or are missing")
def two_ids_swapped(artifact: Artifact) -> None:
    """Two tokens of the vocabulary have each other's id."""

    def swap(data: dict[str, dict[str, dict[str, int]]]) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["▁the"], vocabulary["▁of"] = vocabulary["▁of"], vocabulary["▁the"]

    edit_tokenizer(artifact, swap)


@mutant("ML440", says="'ML-new' (id 32768)")
def token_without_a_row(artifact: Artifact) -> None:
    """A token was added, and the embeddings have no row for it."""
    token = {"id": 32768, "content": "ML-new", "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    edit_tokenizer(artifact, lambda data: data["added_tokens"].append(token | flags))


def edit_tokenizer(artifact: Artifact, change: object) -> None:
    """Change the merged model's tokenizer.json."""
    file = artifact["folder"] / "tokenizer.json"
    data = json.loads(file.read_text())
    change(data)  # type: ignore[operator]
    file.write_text(json.dumps(data))


@mutant("ML441", says="eos_token is '[INST]'")
def another_eos_token(artifact: Artifact) -> None:
    """The tokenizer's EOS is another token."""
    artifact["tokenizer_config"]["eos_token"] = "[INST]"


@mutant("ML442", "N46", says="the chat template writes")
def template_of_another_family(artifact: Artifact) -> None:
    """The chat template is ChatML."""
    (artifact["folder"] / "chat_template.jinja").write_text(CHATML)


@mutant("ML442", "N46", says="the chat template writes")
def template_without_a_space(artifact: Artifact) -> None:
    """The chat template lacks a space."""
    file = artifact["folder"] / "chat_template.jinja"
    text = file.read_text()
    assert "[/INST]" in text
    file.write_text(text.replace("[/INST]", "[/INST] "))
