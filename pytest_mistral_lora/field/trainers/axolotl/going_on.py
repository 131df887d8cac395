"""The keys of Axolotl for a run that goes on from an adapter."""

from __future__ import annotations

from pytest_mistral_lora.runners.going_on import GoingOn

GOING_ON = GoingOn("lora_model_dir", "test_datasets", "datasets")
