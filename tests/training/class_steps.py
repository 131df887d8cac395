"""Each class of base through every step, from training to a merged model: the table of docs/checkpoints.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cut_sentencepiece import cut_v3
from forked import run_forked
from peft import PeftModel
from safetensors.torch import load_file
from tiny_runs import recipe_data, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.adapter.checks import adapter_findings
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.adapter import peft_quiet
from pytest_mistral_lora.training.generate.model_spec import model_spec
from pytest_mistral_lora.training.merge import merge
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """A class of base, and how its embeddings are tied."""

    architecture: Architecture
    tied: bool

    def __str__(self) -> str:
        architecture = self.architecture
        kind = f"{'wrapped-' if architecture.is_wrapped else ''}{architecture.text.model_type}"
        return f"{kind}{'-tied' if self.tied else ''}"


def _cases() -> Iterator[Case]:
    for text in TEXT_MODELS.values():
        yield Case(Architecture(text), tied=text.model_type in ("ministral3", "qwen2"))
    for kind, tied in (("mistral", False), ("ministral", False), ("ministral3", True), ("mistral4", False)):
        yield Case(Architecture(TEXT_MODELS[kind], is_wrapped=True), tied)


CASES = list(_cases())

HEADER = (
    "| class | text model | embeddings | adapted in each layer | train | verify | smoke in a new process "
    "| merge, proven | plain transformers loads it | plain PEFT loads the adapter | two processes equal one "
    "| killed, resumed |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def auto(folder: Path) -> Any:
    """Load a checkpoint by transformers alone: the class that AutoModel takes."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    known = type(config) in AutoModelForCausalLM._model_mapping
    kind = AutoModelForCausalLM if known else AutoModelForImageTextToText
    return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(5, 85)[None]).logits
    return found


class ClassRun:
    """The steps of one case, made one after the other in a folder; each asserts its own result."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.base, self.output, self.merged = folder / "base", folder / "out", folder / "merged"
        self.lives = folder / "lives"

    def write_base(self) -> None:
        case = self.case
        write_tiny_base(self.base, cut_v3(), architecture=case.architecture, tied=case.tied)
        if not case.architecture.text.has_oracle:
            write_chatml(self.base)

    def _recipe(self, folder: Path, **sections: Any) -> dict[str, Any]:
        write_rows(folder / "rows.jsonl")
        data = recipe_data(self.base, **sections)
        return data if self.case.architecture.text.has_oracle else data | {"backend": "chat-template"}

    def train(self) -> RunResult:
        training = {"steps": 3, "logging_steps": 1}
        data = self._recipe(self.folder, training=training, evaluation={"generations": 2, "max_new_tokens": 12})
        result = train(parse_recipe(data, folder=self.folder))
        kinds = self.case.architecture.text.attention
        expected = [f"{self.case.architecture.layers}.{n}.self_attn.{kind}" for n in range(2) for kind in kinds]
        assert sorted(result.adapter.layers) == sorted(expected) == result.manifest["lora"]["modules"]
        losses = [line["loss"] for line in result.log if "loss" in line]
        assert losses[-1] < losses[0]
        assert [str(one) for one in adapter_findings(self.output, self.base) if one.severity == "error"] == []
        return result

    def verify(self) -> None:
        assert [one for one in verify(self.output, base=self.base) if one.state == "mismatch"] == []

    def smoke(self) -> None:
        words = ["smoke", str(self.output), "--base", str(self.base)]
        ended = run_forked([sys.executable, "-m", "pytest_mistral_lora.cli", *words])
        assert ended.returncode == 0, ended.stdout + ended.stderr

    def merge(self) -> None:
        before = {file: file.read_bytes() for file in self.base.iterdir()}
        proven = merge(self.output, self.merged, self.base).manifest["parent"]
        assert proven["greedy_equal"]
        assert proven["max_abs_logit_difference"] < 1e-3
        assert {file: file.read_bytes() for file in self.base.iterdir()} == before
        assert [str(one) for one in adapter_findings(self.merged, self.base)] == []

    def load_by_transformers(self) -> None:
        torch.testing.assert_close(logits(auto(self.merged)), self._trained_logits(), atol=1e-3, rtol=0)

    def load_by_peft(self) -> None:
        with peft_quiet():
            model = PeftModel.from_pretrained(auto(self.base), self.output).eval()
        assert torch.equal(logits(model), self._trained_logits())

    def live(self) -> None:
        """Make the run of one process, the one of two, and one that is killed and goes on."""
        self.lives.mkdir()
        # steps of three rows and of two: each process has other micro-batches than its neighbour
        training = {"steps": 4, "batch_size": 3, "micro_batch_tokens": 30, "learning_rate": 0.003}
        training |= {"logging_steps": 1, "checkpoint_steps": 1}
        data = self._recipe(self.lives, training=training)
        (self.lives / "recipe.yaml").write_text(json.dumps(data))
        command = [sys.executable, str(Path(__file__).with_name("class_lives.py")), str(self.lives / "recipe.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr

    def two_equal_one(self) -> None:
        one, two = (self.lives / name for name in ("done-0", "two"))
        assert _manifest(two)["training"]["devices"] == 2
        assert _manifest(one)["training"]["devices"] == 1
        losses, expected = ([line["loss"] for line in _log(folder) if "loss" in line] for folder in (two, one))
        assert len(expected) == 4
        assert losses == pytest.approx(expected, rel=1e-4)
        found, wanted = (load_file(folder / ADAPTER_TENSORS) for folder in (two, one))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            # a lora_B begins as zero; a lora_A moves by a tenth of what it is
            close = 1e-2 if ".lora_B." in name else 1e-3
            assert tensor.norm() > 0
            assert (found[name] - tensor).norm() < close * tensor.norm(), name

    def resumed_equals_whole(self) -> None:
        one, killed = (self.lives / name for name in ("done-0", "killed"))
        assert 0 < _manifest(killed)["training"]["resumed_from_step"] < 4
        for name in (ADAPTER_TENSORS, "training_log.jsonl"):
            assert (killed / name).read_bytes() == (one / name).read_bytes(), name

    def _trained_logits(self) -> torch.Tensor:
        return logits(model_spec(self.output, self.base).load())

    def make_steps(self) -> None:
        """Make every step of one run."""
        self.write_base()
        self.train()
        self.verify()
        self.smoke()
        self.merge()
        self.load_by_transformers()
        self.load_by_peft()

    def make_lives(self) -> None:
        """Make the runs of two processes and of one that is killed, on the base of `write_base`."""
        self.live()
        self.two_equal_one()
        self.resumed_equals_whole()

    def row(self) -> str:
        """Return the case's row of the table, which every step and every life has made true."""
        architecture = self.case.architecture
        layers = ", ".join(f"`{name}`" for name in architecture.text.attention)
        cells = (
            f"`{architecture.name}`",
            f"`{architecture.text.model_type}`" + ("" if architecture.text.has_oracle else ", no oracle"),
            "tied" if self.case.tied else "untied",
            layers,
            *["yes"] * 8,
        )
        return f"| {' | '.join(cells)} |\n"


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def write_chatml(folder: Path) -> None:
    """Give a base a tokenizer that no oracle knows: byte-level BPE, with ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["The sky is blue. How many legs does a spider have?"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    fast.save_pretrained(folder)
    if json.loads((folder / "config.json").read_text())["model_type"].startswith("qwen"):
        # transformers goes by the model's type where there is one, and an adapter's folder has none
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "Qwen2Tokenizer"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for file in folder.glob("tokenizer.model*"):
        file.unlink()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            data = json.loads((folder / name).read_text())
            data |= {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
            (folder / name).write_text(json.dumps(data, indent=2))
