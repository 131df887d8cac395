"""What every runner has to be told of a recipe's run, each value worked out once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.backends import Encoder
from pytest_mistral_lora.checkpoint.base import require_trainable
from pytest_mistral_lora.errors import RecipeError, TokenizerError
from pytest_mistral_lora.training.adapter import adapted_layers, saved_modules
from pytest_mistral_lora.training.devices import precision_of
from pytest_mistral_lora.training.preparation import encoder_of, resolve_base
from pytest_mistral_lora.training.recipe import Recipe, Training
from pytest_mistral_lora.training.rows.loading import RunData, load_data


@dataclass(frozen=True)
class Run:
    """A recipe's run, ready to be told to a runner.

    Attributes:
        recipe: The recipe.
        base: The base checkpoint on disk; of a Hub base perhaps without weights.
        encoder: The backend.
        tokenizer: What `AutoTokenizer` loads of the base, as a runner does.
        data: The encoded rows.
        precision: `bf16`, `fp16` or `fp32`.
        as_messages: Whether the rows are given as messages, for the runner to encode; else as ids and labels.
    """

    recipe: Recipe
    base: Path
    encoder: Encoder
    tokenizer: Any
    data: RunData
    precision: str
    as_messages: bool = False

    @property
    def model(self) -> str:
        """The base as a runner names it: a Hub repository, or the absolute path of a folder."""
        return self.recipe.base.repo or str(self.base.resolve())

    @property
    def revision(self) -> str | None:
        """The commit of a Hub base."""
        return self.recipe.base.revision

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        training = self.recipe.training
        if training.steps is not None:
            return training.steps
        return math.ceil((training.epochs or 0) * math.ceil(len(self.data.train.rows) / training.batch_size))

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return self.recipe.training.warmup(self.steps)

    @property
    def eval_steps(self) -> int | None:
        """Optimizer steps between two held-out losses; None where nothing is held out."""
        if not self.data.held_out.rows:
            return None
        return self.recipe.training.eval_steps or self.steps

    @property
    def rows_at_once(self) -> int:
        """Rows of a padded micro-batch: the most that divide a step and stay within `micro_batch_tokens`."""
        training = self.recipe.training
        longest = max(self.data.train.lengths.max(), 1)
        sizes = (size for size in range(training.batch_size, 1, -1) if training.batch_size % size == 0)
        return next((size for size in sizes if size * longest <= training.micro_batch_tokens), 1)

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step, on one device."""
        return self.recipe.training.batch_size // self.rows_at_once

    @property
    def alpha(self) -> int:
        """LoRA's alpha, which the three runners take as a whole number.

        Raises:
            RecipeError: If it is none.
        """
        alpha = self.recipe.lora.alpha
        if not alpha.is_integer():
            raise RecipeError(
                f"{alpha}: the runner takes whole numbers only",
                place="lora.alpha",
                next_step="Scale r and alpha so that alpha is one, or train here.",
            )
        return int(alpha)


def plan(recipe: Recipe) -> Run:
    """Check base, layers and rows of a recipe as for a run here, without loading a weight.

    Raises:
        InputError: If base, layers or rows do not allow the run, or transformers cannot load the base's tokenizer.
    """
    base = resolve_base(recipe.base, weights=False)
    config = require_trainable(base)
    adapted_layers(base, recipe.lora.target_modules)
    saved_modules(base, recipe.lora.modules_to_save)
    encoder = encoder_of(recipe, base, config)
    tokenizer = _runner_tokenizer(base)
    return Run(recipe, base, encoder, tokenizer, load_data(recipe, encoder), _precision(recipe.training))


def _precision(training: Training) -> str:
    """Return the recipe's precision, or what `auto` comes to here; the recipe's GPU need not be here."""
    if training.precision != "auto":
        return training.precision
    return str(precision_of(training.model_copy(update={"device": "cpu" if training.device == "cpu" else "auto"})))


def _runner_tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # transformers raises many types, some of them far from the cause
        saving = "from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer"
        raise TokenizerError(
            "transformers finds no tokenizer that it can load, and runners load one of the base",
            place=str(base),
            expected="tokenizer.json and tokenizer_config.json",
            next_step=f"Write them, as a base of its own: {saving}; "
            f"CheckpointTokenizer(Path({str(base)!r})).fast.save_pretrained({str(base)!r})",
        ) from error
