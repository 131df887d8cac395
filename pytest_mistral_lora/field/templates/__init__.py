"""The published chat templates, as hashes and verdicts."""
