"""PEFT's add_weighted_adapter gives adapters of rsLoRA a sum that is √r times too strong."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

RANK = 4


def main() -> None:
    """Compare an adapter with the sum of it alone, at the weight 1."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], use_rslora=True, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(8, 8, bias=False)), config, adapter_name="first")
        model.add_weighted_adapter(["first"], [1.0], "sum", combination_type="cat")
    layer = model.base_model.model[0]
    deltas = [layer.get_delta_weight(name) for name in ("first", "sum")]
    # what a saved and loaded sum is: the scale that its configuration gives
    saved = model.peft_config["sum"]
    factor = saved.lora_alpha / (saved.r**0.5 if saved.use_rslora else saved.r) / layer.scaling["sum"]
    ratio = float((deltas[1].norm() / deltas[0].norm()) * factor)
    state = "no longer true" if abs(ratio - 1) < 0.01 else "still true"
    print(f"{state}: the sum of one adapter of rank {RANK} is {ratio:.3f} times as strong")


if __name__ == "__main__":
    main()
