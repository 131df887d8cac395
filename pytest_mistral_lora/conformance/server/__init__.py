"""Subject `server`: the prompts that a running server feeds its model, compared with mistral-common's."""
