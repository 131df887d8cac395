"""Recompute the values in a manifest and report any difference."""
