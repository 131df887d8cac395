"""Subject `tokenizer`: a checkpoint's tokenizer."""
