"""Write a recipe's run for another runner, or a model for a server.

It imports nothing: `servers` needs no torch, and `run` does.
"""
