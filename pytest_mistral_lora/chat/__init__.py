"""Chat rows, Mistral's own encoding of them, and labels: pure rules, no torch."""
