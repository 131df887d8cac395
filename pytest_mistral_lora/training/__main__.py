"""`python -m pytest_mistral_lora.training recipe.yaml` is `mistral-lora train recipe.yaml`.

Launchers of several processes, such as `accelerate launch -m`, start a module and not a command.
"""

from __future__ import annotations

import sys

from pytest_mistral_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
