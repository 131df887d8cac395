"""Add an adapter to its base's weights: planned, streamed tensor by tensor, and proven before the folder exists."""

from pytest_mistral_lora.training.merge.run import MergedModel, merge

__all__ = ["MergedModel", "merge"]
