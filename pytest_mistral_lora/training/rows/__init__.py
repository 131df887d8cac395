"""The rows of a run: read, encoded once, kept, and counted where a recipe removes some."""
