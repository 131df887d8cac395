"""Checkpoints: base folders, pinned revisions, tokenizers and the tiny model."""
