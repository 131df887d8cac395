"""The bench of the subject `adapter`: a trained adapter and its base, in a folder each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from gallery import Artifact
from of_classes import MadeAdapter
from safetensors.torch import load_file, save_file
from trained import copied, trained

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

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
        opened = AdapterFolder(folder, BaseFolder(base))
        targets = [AdapterTarget("lora", folder, given=opened, dataset=(trained().rows,))]
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


NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT_PATTERN = r".*\.self_attn\.(q_a|q_b|kv_b|o)_proj"
TEXT_PATTERN = r"model\.language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
EXPERTS = "ML426 ML453" if hasattr(transformers, "TokenizersBackend") else "ML453"
"""What fires on adapted experts: from transformers 5 on, they are parameters, which servers read in other layouts."""


def of_class(artifact: Artifact, made: MadeAdapter, base: Path | None = None) -> None:
    """Put an adapter that PEFT wrote, and its base or another one, in the place of the trained ones."""
    _put(artifact, made.adapter, base or made.base)


def _put(artifact: Artifact, adapter: Path, base: Path) -> None:
    shutil.rmtree(artifact["base"])
    shutil.copytree(base, artifact["base"])
    for name in (CONFIG, TENSORS):
        (artifact["folder"] / name).unlink()
        shutil.copy(adapter / name, artifact["folder"] / name)
    artifact["config"] = json.loads((artifact["folder"] / CONFIG).read_text())
    artifact["tensors"] = {name: one.clone() for name, one in load_file(artifact["folder"] / TENSORS).items()}
    artifact["base_config"] = json.loads((artifact["base"] / "config.json").read_text())
