"""One of two processes of a run, as `torchrun` starts them. Called with: base, output folder, on_finding."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, cast

from guarded_runs import chat_rows, decay_everything, encoded, losses_of, make_trainer
from torch.nn.functional import cross_entropy

from pytest_mistral_lora import GuardError, guard
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.guarding.settings import OnFinding


def _shifted_twice(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return cross_entropy(outputs.logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten())


def _masks_late(trainer: Any) -> None:
    """Let the collator of the second process mask the EOS of each row from its third batch on."""
    own, calls = trainer.data_collator, []

    def collate(items: list[dict[str, Any]]) -> Any:
        calls.append(len(items))
        batch = own(items)
        if os.environ["RANK"] == "1" and len(calls) > 2:
            batch["labels"][batch["input_ids"] == 2] = -100
        return batch

    trainer.data_collator = collate


def main(base: Path, output: Path, how: str) -> None:
    rows = encoded(Oracle(shipped_tokenizer("spm-v3")), chat_rows(16), messages=True)
    if how in ("stop", "warn"):
        rows[1]["labels"][-1] = -100  # in the share of the second process
    settings = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "max_steps": 3}
    trainer = make_trainer(base, rows, output, **settings)
    if how == "stop at the loss":
        trainer.compute_loss_func = _shifted_twice
    if how == "stop at the weights" and os.environ["RANK"] == "1":
        decay_everything(trainer)
    if how == "stop at a later step":
        _masks_late(trainer)
    on_finding = cast(OnFinding, how.partition(" ")[0])
    callback = None if how == "unguarded" else guard(trainer, on_finding=on_finding, batches=1, every=1)
    found: dict[str, Any] = {"stopped": ""}
    try:
        trainer.train()
    except GuardError as error:
        found["stopped"] = str(error)
    verdict = callback.verdict if callback else None
    found |= {"losses": losses_of(trainer), "ok": None if verdict is None else verdict.ok}
    (output / f"process-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
