"""Subject `train`: the checks of one tiny end-to-end train with the target's tokenizer, and of the laws of training."""
