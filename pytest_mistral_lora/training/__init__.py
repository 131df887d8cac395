"""From a recipe to an adapter: data, LoRA, loop, saved folder, smoke test. Knows nothing of pytest."""
