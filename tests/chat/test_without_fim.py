"""Without the modules of fill-in-the-middle, the package imports, and its other kinds are read and encoded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest_mistral_lora

FOLDER = Path(pytest_mistral_lora.__file__).parent
OF_FIM = ("chat/kinds/fim", "formats/fill_in_the_middle.py", "conformance/mask/fim_law.py")
CODE = """
import importlib, json, pkgutil, sys
import pytest_mistral_lora
from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.read_back import read_back
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.formats.recognition import FORMATS

for room in ("chat", "formats", "runners", "serving", "strategies", "records"):
    package = importlib.import_module(f"pytest_mistral_lora.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if ".scripts" not in module.name:
            importlib.import_module(module.name)
for module in ("cli.render", "training.rows.dataset", "conformance.template", "conformance.mask.checks"):
    importlib.import_module(f"pytest_mistral_lora.{module}")
oracle = Oracle.load("spm-v3")
[row] = parse_rows({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
encoded = oracle.encode(row)
try:
    parse_rows({"prompt": "a", "suffix": "b", "completion": "c"})
    refused = ""
except RowError as error:
    refused = error.found
print(json.dumps({
    "kinds": [*KINDS],
    "formats": [*FORMATS],
    "file": pytest_mistral_lora.__file__,
    "ids": encoded.input_ids,
    "same": read_back(encoded.input_ids, oracle) == row,
    "refused": refused,
}))
"""


def test_the_rest_of_the_package_does_without_the_kind(tmp_path):
    copy = tmp_path / FOLDER.name
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__", "goldens"))
    for name in OF_FIM:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["file"] == str(copy / "__init__.py")
    assert found["kinds"] == ["conversation", "pair", "unpaired"]
    assert "fim" not in found["formats"]
    assert (found["ids"], found["same"]) == ([1, 3, 16127, 4, 23325, 2], True)
    assert found["refused"]
