"""Mistral's own tokenization: the truth for ids, a trace of who encoded which tokens, and reasons for rejections."""
