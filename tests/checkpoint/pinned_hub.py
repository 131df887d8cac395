"""A Hub on 127.0.0.1 with two commits; each call of `resolve` is a process of its own, with its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub import Hub, Repository

REPO = "tiny/mistral"
TOKENIZER = "tokenizer.model.v3"
CALL = """
import json, sys
from pytest_mistral_lora.checkpoint.pins import resolve
from pytest_mistral_lora.errors import PinError
try:
    print(json.dumps({"folder": str(resolve(*sys.argv[1:3], **json.loads(sys.argv[3])))}))
except PinError as error:
    fields = {"found": error.found, "place": str(error.place), "next_step": error.next_step}
    print(json.dumps({"error": str(error), **fields}))
"""


@dataclass
class Place:
    """A hub with one repository of two commits, and a cache."""

    hub: Hub
    home: Path
    repository: Repository
    old: str
    new: str
    environment: dict[str, str] = field(default_factory=dict)

    def resolve(
        self, revision: str, *, repo: str = REPO, offline: bool = False, endpoint: str = "", **options: Any
    ) -> dict[str, str]:
        done = self.run(
            [sys.executable, "-c", CALL, repo, revision, json.dumps({"weights": False} | options)], offline, endpoint
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def fetch(self, revision: str, **options: Any) -> Path:
        answer = self.resolve(revision, **options)
        assert "folder" in answer, answer["error"]
        return Path(answer["folder"])

    def run(self, command: list[str], offline: bool = False, endpoint: str = "") -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home),
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": endpoint or self.hub.url,
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    @property
    def cache(self) -> Path:
        return self.home / "hub" / "models--tiny--mistral"

    def snapshot(self, commit: str) -> Path:
        return self.cache / "snapshots" / commit
