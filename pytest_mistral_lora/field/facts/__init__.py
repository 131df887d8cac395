"""Dated facts about programs, as data: known faults, and versions that work together."""
