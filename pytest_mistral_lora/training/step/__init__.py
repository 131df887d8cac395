"""The rows of an optimizer step: their choice, their micro-batches, and their packing without padding."""

from pytest_mistral_lora.training.step.packing import DEALING, Segment, StepRow, StepSampler, micro_batches, pack_rows

__all__ = ["DEALING", "Segment", "StepRow", "StepSampler", "micro_batches", "pack_rows"]
