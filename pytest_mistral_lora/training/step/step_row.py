"""One row of an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX


@dataclass(frozen=True)
class StepRow:
    """One row of a step, as tensors on the CPU.

    Attributes:
        index: Its place in the dataset.
        input_ids: `(tokens,)` int64.
        labels: `(tokens,)` int64.
    """

    index: int
    input_ids: torch.Tensor
    labels: torch.Tensor

    @cached_property
    def targets(self) -> torch.Tensor:
        """The places of the supervised tokens, `(supervised tokens,)` int64. The first token follows none."""
        return (self.labels[1:] != IGNORE_INDEX).nonzero().squeeze(1) + 1

    @cached_property
    def fed(self) -> int:
        """How many tokens are fed: those before the last supervised one. What comes later changes no loss."""
        targets = self.targets
        return int(targets[-1]) if len(targets) else 0
