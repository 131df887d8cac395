"""Runs that end early: checkpoints, signals, failures, and the folder that they leave."""
