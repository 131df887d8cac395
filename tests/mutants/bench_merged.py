"""The bench of the subject `merged`: a base, an adapter of it, and what PEFT merges of the two."""

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
from gallery import Artifact
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from trained import WEIGHTS, copied
from transformers import MistralConfig, MistralForCausalLM

from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import NamedPaths, collect
from pytest_mistral_lora.conformance.finding import Finding

RANK, LAYERS = 4, 3
Q1 = "model.layers.1.self_attn.q_proj.weight"
K1 = "model.layers.1.self_attn.k_proj.weight"
HEAD, EMBEDDINGS, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@cache
def plain_merge(dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny base with its tokenizer, an adapter of it, and what `merge_and_unload` makes of the two."""
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
        MistralForCausalLM(config).to(dtype).save_pretrained(folder / "base")
        model = MistralForCausalLM.from_pretrained(folder / "base", dtype=dtype)
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
        targets = NamedPaths(adapters=adapters, base=artifact["base"]).targets()[:1]
        settings = Settings(20, None, "cpu", True, (), False, folder)
        checks = [check for check in collect(targets, settings) if check.subject in (self.subject, "adapter")]
        return [finding for check in checks for finding in check.run().findings]


BENCH = MergedBench()


def changed(artifact: Artifact, name: str, factor: float) -> torch.Tensor:
    """Return the base's tensor with a multiple of the change that was merged."""
    before, after = artifact["before"][name].float(), artifact["tensors"][name].float()
    return (before + factor * (after - before)).bfloat16()


def merge_in(artifact: Artifact, dtype: torch.dtype, factor: float) -> None:
    """Put base and adapter in a dtype in the place of the bench's, and PEFT's merge with a multiple of the scale.

    Args:
        artifact: What is changed.
        dtype: dtype of base and merged model.
        factor: What the scale is multiplied by.
    """
    source = plain_merge(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MistralForCausalLM.from_pretrained(source / "base", dtype=dtype)
        adapted = PeftModel.from_pretrained(model, source / "lora")
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= factor
        artifact["tensors"] = dict(adapted.merge_and_unload().state_dict())
    artifact["base"], artifact["adapter"] = source / "base", source / "lora"
    artifact["config"] = json.loads((source / "merged" / "config.json").read_text())
    artifact["adapter_at_hand"] = True


def random_like(tensor: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Return random numbers of a tensor's size and scale."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(tensor.shape, generator=random) * tensor.float().std()).to(tensor.dtype)


def low_rank_head(artifact: Artifact) -> torch.Tensor:
    """Return the base's head with LoRA merged into it."""
    random = torch.Generator().manual_seed(2)
    before = artifact["before"][HEAD].float()
    b, a = torch.randn(before.shape[0], RANK, generator=random), torch.randn(RANK, before.shape[1], generator=random)
    return (before + b @ a / 200).bfloat16()


def edit_tokenizer(artifact: Artifact, change: object) -> None:
    """Change the merged model's tokenizer.json."""
    file = artifact["folder"] / "tokenizer.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
