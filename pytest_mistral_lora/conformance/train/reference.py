"""What a step must come to, without the trainer: row by row, unpadded, in float64, with plain transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Reference:
    """The loss of some rows and its gradient by an adapter.

    Attributes:
        loss: Mean over the supervised tokens of all rows, in nats.
        tokens: How many these are.
        gradients: By the adapter's names; CPU float64.
    """

    loss: float
    tokens: int
    gradients: Mapping[str, torch.Tensor]


def plain_base(folder: Path) -> Any:
    """Return the checkpoint as transformers loads it, in float64 on the CPU, without PEFT."""
    import torch
    from transformers import MistralForCausalLM

    model = MistralForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", use_safetensors=True, local_files_only=True
    )
    return model.eval().requires_grad_(False)


def adapted_weights(
    weights: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], scale: float
) -> dict[str, torch.Tensor]:
    """Return the base's adapted weights with the adapter worked in by hand: `W + scale * B @ A`.

    Args:
        weights: The base's tensors, by the checkpoint's names.
        adapter: The adapter's, by the names of `adapter_model.safetensors`.
        scale: alpha / r.
    """
    found = {}
    for name, down in adapter.items():
        if ".lora_A." in name:
            weight = name.removeprefix(_PREFIX).replace(".lora_A.", ".")
            up = adapter[name.replace(".lora_A.", ".lora_B.")]
            found[weight] = weights[weight] + scale * up.to(weights[weight].dtype) @ down.to(weights[weight].dtype)
    return found


def reference(base: Path, adapter: Mapping[str, torch.Tensor], scale: float, rows: Sequence[EncodedRow]) -> Reference:
    """Return the loss of rows under base and adapter, and its gradient.

    Args:
        base: A checkpoint folder.
        adapter: The adapter's tensors, by the names of `adapter_model.safetensors`.
        scale: alpha / r.
        rows: Encoded rows with labels.
    """
    import torch

    model = plain_base(base)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in adapter.items()}
    changed = adapted_weights(model.state_dict(), leaves, scale)
    losses = torch.cat([_losses(model, changed, row) for row in rows])
    loss = losses.sum() / len(losses)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return Reference(loss.item(), len(losses), dict(zip(leaves, gradients, strict=True)))


def _losses(model: Any, changed: dict[str, torch.Tensor], row: EncodedRow) -> torch.Tensor:
    """Return the loss of each supervised token, each predicted from the tokens before it."""
    import torch

    ids = torch.tensor([row.input_ids])
    output = torch.func.functional_call(model, changed, kwargs={"input_ids": ids, "use_cache": False})
    scores = output.logits[0].log_softmax(dim=-1)
    return torch.stack([-scores[place - 1, token] for place, token in supervised(row)])


def supervised(row: EncodedRow) -> Iterable[tuple[int, int]]:
    """Return place and id of each supervised token."""
    return [(place, label) for place, label in enumerate(row.labels or ()) if label != IGNORE_INDEX]
