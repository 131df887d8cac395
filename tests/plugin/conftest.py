from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plugin_rows import ROW, write_rows

from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collect import collect
from pytest_mistral_lora.conformance.targets import Target, embedded_targets
from pytest_mistral_lora.plugin.settings import PluginSettings

Run = Callable[..., pytest.RunResult]


@pytest.fixture(scope="session", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory) -> None:
    # pytester forgets what a run in this process has imported, and torch cannot be imported twice
    import torch  # noqa: F401

    from pytest_mistral_lora.report import session  # noqa: F401

    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "rows.jsonl", [ROW])
    for update in (True, False):
        settings = Settings(1, None, "cpu", True, (folder,), update, folder)
        for check in collect([Target("spm-v1")], settings):
            if check.case in ("file", "text-ids", "save-and-load", "single", "own-rows-1", "template-agrees"):
                assert check.run().findings == ()


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
        return path

    return write
