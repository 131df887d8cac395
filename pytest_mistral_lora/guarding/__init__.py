"""The guard of a trainer: judge its first batches, its model and its tokenizer before a weight moves."""
