from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plugin_rows import write_rows

from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.targets import embedded_targets
from pytest_mistral_lora.plugin.settings import PluginSettings

Run = Callable[..., pytest.RunResult]


@pytest.fixture(scope="session", autouse=True)
def libraries(suite_libraries: None) -> None:
    """Nearly every test here runs the suite in this process."""


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("CI", "PYTEST_ADDOPTS", "FORCE_COLOR", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def every_id() -> list[str]:
    settings = Settings(1, None, "cpu", False, (), False, Path())
    return [f"mistral-golden::{check.name}" for check in collect(embedded_targets(), settings)]


@pytest.fixture
def golden(pytester: pytest.Pytester) -> Run:
    def run(*args: Any) -> pytest.RunResult:
        return pytester.runpytest_inprocess("--mistral-golden", *args)

    return run


@pytest.fixture
def settings_of(pytester: pytest.Pytester) -> Callable[..., PluginSettings]:
    def read(*args: Any) -> PluginSettings:
        config = pytester.parseconfigure("--mistral-golden", *args)
        suite: Any = config.pluginmanager.get_plugin("mistral_lora_suite")
        settings: PluginSettings = suite.settings
        return settings

    return read


@pytest.fixture
def own_rows(pytester: pytest.Pytester) -> Callable[..., Path]:
    def write(*rows: dict[str, Any], folder: str = "goldens") -> Path:
        path = pytester.path / folder
        path.mkdir(exist_ok=True)
        write_rows(path / "rows.jsonl", rows)
        return Path(folder)  # as reports name it

    return write
