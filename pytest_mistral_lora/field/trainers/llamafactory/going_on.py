"""The keys of LLaMA-Factory for a run that goes on from an adapter."""

from __future__ import annotations

from pytest_mistral_lora.runners.going_on import GoingOn

GOING_ON = GoingOn("adapter_name_or_path", "eval_dataset", "dataset")
