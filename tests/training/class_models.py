"""Tiny models of each class that is trained, and the distance of a packed step from its rows, each alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.errors import PinError
from pytest_mistral_lora.training.adapter import peft_quiet
from pytest_mistral_lora.training.step import StepRow
from pytest_mistral_lora.training.step.forward import attend_in_segments, supervised_losses
from pytest_mistral_lora.training.step.frozen_layers import use_frozen_layers

VOCABULARY, WINDOW, SCALED_FROM = 64, 6, 8
FUSED_EXPERTS = hasattr(transformers, "TokenizersBackend")
"""Whether this transformers has the experts of a layer as one tensor: from version 5 on."""
POSITIONS = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": SCALED_FROM,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "sliding_window": None,
}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": ...,
    "sliding_window": ...,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    # of another size than queries and keys, as the class allows
    "v_head_dim": 12,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": POSITIONS,
}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "ministral": {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
    "ministral3": {"rope_parameters": POSITIONS},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral4": LATENT,
}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Case:
    """A class of models, whether its text is in a wrapper and its head its embeddings, and whether MLPs are adapted."""

    kind: str
    wrapped: bool = False
    tied: bool = False
    with_mlp: bool = False

    def __str__(self) -> str:
        return f"{'wrapped-' * self.wrapped}{self.kind}{'-tied' * self.tied}"

    @property
    def architecture(self) -> Architecture:
        return Architecture(TEXT_MODELS[self.kind], is_wrapped=self.wrapped)

    def config(self, **sizes: Any) -> Any:
        """Return a configuration with these sizes in place of the usual ones; skip if transformers lacks the class."""
        architecture = self.architecture
        try:
            model_class = architecture.model_class()
        except PinError as error:
            pytest.skip(str(error))
        given = {**SIZES, **OWN.get(self.kind, {}), "tie_word_embeddings": self.tied, **sizes}
        # a copy: a configuration writes into the mappings that it is given
        settings = copy.deepcopy({key: value for key, value in given.items() if value is not ...})
        config = getattr(transformers, architecture.text.name).config_class(**settings)
        if self.wrapped:
            parts = {"text_config": config.to_dict(), "vision_config": VISION, "tie_word_embeddings": self.tied}
            config = model_class.config_class(**parts, initializer_range=SIZES["initializer_range"])
        config.architectures = [architecture.name]
        return config

    def model(self) -> Any:
        """Return a random model in float64, with an adapter that is not zero on each layer that the case names."""
        architecture, config = self.architecture, self.config()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = architecture.model_class()(config)
            if hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")  # torch has no grouped product in float64
            names = architecture.targets(["attention+mlp" if self.with_mlp else "attention"])
            layers = [
                name
                for name, module in model.named_modules()
                if name.startswith(f"{architecture.layers}.")
                and isinstance(module, torch.nn.Linear)
                and name.rpartition(".")[2] in names
            ]
            assert layers
            with peft_quiet():
                model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=layers, bias="none"))
            for name, parameter in model.named_parameters():
                if ".lora_B." in name or name.endswith(".bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
        return model.double().eval()


LENGTHS, PREFIX = (3, 9, 20, 31, 70), 18
"""Rows within a window and beyond it, below the first step of the scaling and above, and of more than one block."""


def step_rows() -> list[StepRow]:
    """Return rows of several lengths, of which the last two begin with the same tokens, without a loss on them."""
    generator = torch.Generator().manual_seed(5)
    rows, prefix = [], torch.randint(3, VOCABULARY, (PREFIX,), generator=generator)
    for index, length in enumerate((*LENGTHS, PREFIX + 5, PREFIX + 11)):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.5, ids, IGNORE_INDEX)
        if index >= len(LENGTHS):
            ids[:PREFIX], labels[:PREFIX] = prefix, IGNORE_INDEX
        labels[-1] = ids[-1]
        rows.append(StepRow(index, ids, labels))
    return rows


def row_by_row(model: Any, rows: list[StepRow]) -> torch.Tensor:
    """Return the mean loss of the supervised tokens, each row a pass of its own through transformers and PEFT alone."""
    losses = []
    for row in rows:
        logits = model(input_ids=row.input_ids[None], use_cache=False).logits[0]
        for place in range(1, len(row.labels)):
            if row.labels[place] != IGNORE_INDEX:
                losses.append(-logits[place - 1].log_softmax(dim=-1)[row.labels[place]])
    return torch.stack(losses).mean()


def gradients(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    assert all(grad is not None for grad in found.values()), [name for name, grad in found.items() if grad is None]
    return found


def distance(case: Case, *, share_prefix: bool = False) -> tuple[float, float]:
    """Return the relative distance of the loss, and the largest of a gradient by its norm."""
    reference, rows = case.model(), step_rows()
    model = copy.deepcopy(reference)
    attend_in_segments(model)
    use_frozen_layers(model)
    truth = row_by_row(reference, rows)
    loss = supervised_losses(model, rows, share_prefix=share_prefix)[0].mean()
    apart = abs(loss.item() - truth.item()) / truth.item()
    exact, found = gradients(truth, reference), gradients(loss, model)
    assert found.keys() == exact.keys()
    return apart, max(float((found[name] - one).norm() / one.norm()) for name, one in exact.items())
