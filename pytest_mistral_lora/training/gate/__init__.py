"""The gate of a run: compare base and adapter on held-out rows, on rows of other subjects, and by their answers."""
