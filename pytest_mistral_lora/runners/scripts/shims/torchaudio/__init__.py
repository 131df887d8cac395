"""An empty stand-in for torchaudio, for a runner that imports it and, for text, never uses it."""
