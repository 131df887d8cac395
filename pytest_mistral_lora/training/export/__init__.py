"""Write a recipe's run for another runner: its configuration, and rows that it trains on as this trainer does.

An export is a prepared run, so it is a part of `training`: it uses the recipe's models, the pinned base, and rows that
are already split, encoded and cut. It knows how runners are configured, not how they encode.
"""

from pytest_mistral_lora.training.export.run import export, why_not_messages

__all__ = ["export", "why_not_messages"]
