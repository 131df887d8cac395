"""Subject `runner`: what another trainer would train on, made by its own code."""
