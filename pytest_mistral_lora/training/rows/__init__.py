"""The rows of a run: read and encoded once, counted, kept in tables of Arrow."""
