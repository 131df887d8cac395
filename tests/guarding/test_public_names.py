"""The names of the guard: light to import, with examples that run."""

from __future__ import annotations

import doctest
import subprocess
import sys

from pytest_mistral_lora.guarding import callback

CODE = """
import sys
import pytest_mistral_lora
assert {"guard", "MistralGuard", "GuardError"} <= set(pytest_mistral_lora.__all__)
print({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy", "pytest", "mistral_common"})
from pytest_mistral_lora import GuardError
print({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy", "pytest", "mistral_common"})
"""


def test_the_package_stays_light_until_a_guard_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["set()"] * 2), done.stderr


def test_the_examples_in_the_docstrings_run() -> None:
    outcome = doctest.testmod(callback)
    assert outcome.failed == 0
    assert outcome.attempted >= 4
