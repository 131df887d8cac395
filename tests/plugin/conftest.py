from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_sentencepiece import cut_v3
from plugin_rows import NAMED, ROW, write_rows

from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.targets import embedded_targets
from pytest_mistral_lora.plugin.settings import PluginSettings
from pytest_mistral_lora.training.generate.model_spec import Question, ask, model_spec
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import train

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


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a base, the adapter `lora` that learned one answer on it, and that answer as a golden."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tuned")
    base = write_tiny_base(folder / "base", cut_v3())
    write_rows(folder / "rows.jsonl", [ROW])
    training = {"steps": 30, "learning_rate": 0.01, "schedule": "constant", "batch_size": 1, "device": "cpu"}
    data = {
        "base": {"path": "base", "weights_sha256": BaseFolder(base).weights_sha256},
        "data": {"train": ["rows.jsonl"]},
        "training": training,
        "output": "lora",
    }
    (folder / "recipe.yaml").write_text(json.dumps(data))  # JSON is YAML
    result = train(parse_recipe(data, folder=folder))
    (folder / "goldens").mkdir()
    write_rows(folder / "goldens" / "rows.jsonl", [NAMED])
    spec = model_spec(result.output, base)
    [row] = read_rows(folder / "goldens" / "rows.jsonl")
    answer = ask(spec.load(), spec, Question.of_line("prime", row, NAMED, None))
    answer.put(folder / "goldens" / "transcripts" / "lora" / "prime.json", None)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def here(tuned: Path, pytester: pytest.Pytester) -> Path:
    """A copy of it to break, in the folder that pytest runs in."""
    shutil.copytree(tuned, pytester.path, dirs_exist_ok=True)
    return Path()  # as reports name it
