"""The guard as a plugin of Axolotl, for the key `plugins` of its YAML."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from pytest_mistral_lora.field.trainers.axolotl.trainer import AXOLOTL
from pytest_mistral_lora.guarding.callback import guard


class AxolotlGuard(BasePlugin):
    """Guards the trainer that Axolotl makes, and stops it before a weight moves."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Add the guard, which judges by the objective that the configuration declares."""
        guard(trainer).use_declaration(AXOLOTL.declares(cfg))
