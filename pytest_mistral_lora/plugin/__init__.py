"""The pytest plugin. Until `--mistral-golden` is given it imports nothing but pytest and the standard library."""

from __future__ import annotations

import pytest

from pytest_mistral_lora.plugin import options

MARKERS = (
    "mistral_golden: a check of the Mistral conformance suite (made by --mistral-golden)",
    "mistral_training: trains a model; left out by --mistral-golden-skip-training",
    "mistral_gpu: needs a CUDA device; skipped where there is none",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options and their ini twins."""
    options.add(parser)


@pytest.hookimpl(trylast=True)  # after pytest-xdist has read its own options
def pytest_configure(config: pytest.Config) -> None:
    """Register markers and fixtures, and the suite itself if it is asked for."""
    from pytest_mistral_lora.plugin import fixtures

    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    config.pluginmanager.register(fixtures, "mistral_lora_fixtures")
    if options.asked_for(config):
        from pytest_mistral_lora.plugin.settings import read
        from pytest_mistral_lora.plugin.suite import Suite

        config.pluginmanager.register(Suite(config, read(config)), "mistral_lora_suite")
