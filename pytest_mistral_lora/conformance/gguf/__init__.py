"""Subject `gguf`: a GGUF file against the tokenizer, the weights and the adapter that it was made from."""
