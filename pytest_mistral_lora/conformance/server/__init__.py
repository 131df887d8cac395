"""Subject `server`: the prompts that a running server feeds its model, against mistral-common."""
