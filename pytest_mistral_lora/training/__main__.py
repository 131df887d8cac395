"""Train a recipe: `python -m pytest_mistral_lora.training recipe.yaml`, or the same after `accelerate launch -m`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_mistral_lora.errors import EXIT_OK, MistralLoraError
from pytest_mistral_lora.training.recipe import load_recipe
from pytest_mistral_lora.training.recovery.failure import exit_code, is_out_of_memory


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m pytest_mistral_lora.training") -> int:
    """Run the command line; returns the exit code (0, 1 failed, 2 bad input, 3 out of memory, 130 or 143 stopped)."""
    parser = argparse.ArgumentParser(prog=prog, description="Train a recipe's adapter and write its folder.")
    parser.add_argument("recipe", type=Path, help="recipe.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of an unfinished run")
    given = parser.parse_args(arguments)
    try:
        recipe = load_recipe(given.recipe)
        from pytest_mistral_lora.training.devices import is_main
        from pytest_mistral_lora.training.recovery.signals import stop_on_signals
        from pytest_mistral_lora.training.run import train

        with stop_on_signals() as stop:
            result = train(recipe, resume=given.resume, progress="bar" if sys.stderr.isatty() else "lines", stop=stop)
    except (MistralLoraError, KeyboardInterrupt, MemoryError) as error:
        sys.stderr.write(f"error: {error or 'interrupted'}\n")
        return exit_code(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write(f"error: out of memory: {error}\n")
        return exit_code(error)
    if is_main():
        sys.stdout.write(f"{result.output}\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
