from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer


@functools.cache
def _load(name: str) -> Oracle:
    return Oracle(shipped_tokenizer(name))


@pytest.fixture(scope="session")
def oracle_of() -> Callable[[str], Oracle]:
    return _load


@pytest.fixture(scope="session", params=sorted(SHIPPED))
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return _load(request.param)


@pytest.fixture(scope="session", params=sorted(set(SHIPPED) - {"spm-v1"}))
def oracle_with_tools(request: pytest.FixtureRequest) -> Oracle:
    return _load(request.param)


def _newer_tekken(folder: Path, version: str) -> Path:
    """Write a Tekken file of a version that mistral-common knows but does not ship; the vocabulary is a shipped one."""
    data = json.loads(shipped_tokenizer("tekken-240718").read_text(encoding="utf-8"))
    literals = [*_load("tekken-240718").control_tokens.values()][:20] + [f"<SPECIAL_{n}>" for n in range(20, 32)]
    literals += ["[ARGS]", "[CALL_ID]"]
    literals += [] if version == "v11" else ["[THINK]", "[/THINK]"]  # thinking tokens came with v13
    data["config"]["version"] = version
    data["special_tokens"] = [
        {"rank": rank, "token_str": literal, "is_control": True} for rank, literal in enumerate(literals)
    ]
    path = folder / version / "tekken.json"
    path.parent.mkdir()
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture(scope="session", params=["v11", "v13"])
def newer_oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(_newer_tekken(tmp_path_factory.mktemp("tekken"), request.param))
