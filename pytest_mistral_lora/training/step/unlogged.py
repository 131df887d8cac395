"""The loss since the last line of the log, which a checkpoint keeps: a resumed run logs what it would have logged."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class UnloggedLoss(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Sums the losses of the steps, in nats a token."""

    def __init__(self) -> None:
        self._sum, self._steps = 0.0, 0

    def add(self, loss: float) -> None:
        """Add the loss of a step."""
        self._sum += loss
        self._steps += 1

    def take(self) -> float:
        """Return the mean over the steps, and begin again."""
        mean = self._sum / self._steps
        self._sum, self._steps = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        """Return what transformers writes into the state of a checkpoint."""
        return {"args": {}, "attributes": {"sum": self._sum, "steps": self._steps}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the sum of the checkpoint, or with none."""
        kept = state.stateful_callbacks[type(self).__name__]["attributes"] if state.global_step else {}
        self._sum, self._steps = kept.get("sum", 0.0), kept.get("steps", 0)
