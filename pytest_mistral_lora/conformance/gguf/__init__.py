"""Subject `gguf`: a GGUF file compared with the tokenizer, the weights and the adapter that it was made from."""
