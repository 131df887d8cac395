"""Checkpoints: pinned revisions, tokenizers, base models and the tiny model."""
