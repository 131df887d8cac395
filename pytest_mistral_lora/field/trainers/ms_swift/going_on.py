"""The keys of ms-swift for a run that goes on from an adapter."""

from __future__ import annotations

from pytest_mistral_lora.runners.going_on import GoingOn

GOING_ON = GoingOn("adapters", "val_dataset", "dataset", file="args.json")
