"""Write a recipe's run for another runner: its configuration, and rows that it trains on like the trainer here.

An export is a prepared run, so it stands in `training`: it uses the recipe's models, the pinned base, and rows that are
split, encoded and cut already. It knows how runners are configured, not how they encode.
"""
