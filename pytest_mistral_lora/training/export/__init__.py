"""A recipe's run in the words of another runner: its configuration, and rows that it trains on as we would.

It stands in `training`, since what is exported is a prepared run: the recipe's own models, its pinned base, its rows
split, encoded and cut as they would be here. It knows how runners are configured, not how they encode.
"""
