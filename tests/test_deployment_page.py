"""The journey of docs/deployment.md: its commands are run, and print what the page shows."""

from __future__ import annotations

import json
from pathlib import Path

import deployment_page
import pytest


def test_the_page_shows_what_its_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    deployment_page.prepare(tmp_path)
    page = deployment_page.PAGE.read_text(encoding="utf-8")
    made = deployment_page.made(page, tmp_path)
    assert made == page, "Run: python scripts/deployment_page.py"
    # the end of the journey: A is served again, and nothing else
    served = {}
    for name in ("lora-a", "merged-a", "lora-b"):
        served[name] = json.loads((tmp_path / name / "manifest.json").read_text())["deployment"]
    assert served == {"lora-a": {"as": "adapter", "name": "support"}, "merged-a": None, "lora-b": None}
