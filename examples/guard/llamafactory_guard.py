"""Train with LLaMA-Factory, guarded: python llamafactory_guard.py CONFIG.yaml."""

import sys
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

from pytest_mistral_lora import MistralGuard

run_exp(yaml.safe_load(Path(sys.argv[1]).read_text()), callbacks=[MistralGuard()])
