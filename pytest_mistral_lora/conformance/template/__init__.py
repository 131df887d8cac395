"""Subject `template`: goldens and the chat template."""
