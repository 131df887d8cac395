"""Without the modules of fill-in-the-middle and its rules, the package imports, and the tests of the rest pass."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from package_copy import PACKAGE, ROOT, copied_without, run_in, run_tests_in

OF_FIM = (
    "chat/kinds/fim",
    "formats/fill_in_the_middle.py",
    "conformance/dataset/fim.py",
    "conformance/encoded/fim_faults.py",
    "conformance/mask/fim_law.py",
)
RULES_OF_FIM = {"dataset": range(670, 675), "encoded": range(575, 580)}
CODE = """
import importlib, json, pkgutil, sys
import pytest_mistral_lora
from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.read_back import read_back
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.formats.recognition import FORMATS

for module in pkgutil.walk_packages(pytest_mistral_lora.__path__, "pytest_mistral_lora."):
    # training imports torch; scripts for the environment of another program import that program
    is_heavy = module.name.startswith("pytest_mistral_lora.training.") and "rows" not in module.name
    if not is_heavy and not module.name.endswith(("__main__", ".axolotl.guard")) and ".scripts" not in module.name:
        importlib.import_module(module.name)
oracle = Oracle.load("spm-v3")
[row] = parse_rows({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
encoded = oracle.encode(row)
try:
    parse_rows({"prompt": "a", "suffix": "b", "completion": "c"})
    refused = ""
except RowError as error:
    refused = error.found
with open("rows.jsonl", "w") as file:
    file.write(row.to_jsonl())
sys.stdout = sys.stderr
code = main(["check", "rows.jsonl", "--tokenizer", "spm-v3"])
sys.stdout = sys.__stdout__
print(json.dumps({
    "kinds": [*KINDS],
    "formats": [*FORMATS],
    "file": pytest_mistral_lora.__file__,
    "ids": encoded.input_ids,
    "same": read_back(encoded.input_ids, oracle) == row,
    "refused": refused,
    "code": code,
}))
"""
OTHER_TESTS = (
    "tests/test_toy_verbs.py",
    "tests/chat/test_read_back.py",
    "tests/chat/test_rows.py",
    "tests/conformance/test_dataset.py",
    "tests/conformance/test_encoded_lines.py",
    "tests/conformance/test_encoded_pairs.py",
    "tests/conformance/test_rule_proofs.py",
    "tests/guarding/test_guarded_toys.py",
)
"""Tests of the rooms that ask kinds, from reading to a guard; none of them has a fill-in-the-middle row."""


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a copy of the package without fill-in-the-middle. No module of the rest is edited."""
    folder = tmp_path_factory.mktemp("without")
    copy = copied_without(folder, *OF_FIM)
    for subject, numbers in RULES_OF_FIM.items():
        table = copy / "conformance" / "rules" / f"{subject}.toml"
        sections = re.split(r"(?m)^(?=\[ML)", table.read_text(encoding="utf-8"))
        rules = tuple(f"[ML{number}" for number in numbers)
        kept = [section for section in sections if not section.startswith(rules)]
        assert len(kept) < len(sections)
        table.write_text("".join(kept), encoding="utf-8")
    return folder


def test_the_rest_of_the_package_does_without_the_kind(without: Path) -> None:
    done = run_in(without, "-c", CODE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["file"] == str(without / PACKAGE.name / "__init__.py")
    assert found["kinds"] == ["conversation", "pair", "unpaired"]
    assert "fim" not in found["formats"]
    assert (found["ids"], found["same"]) == ([1, 3, 16127, 4, 23325, 2], True)
    assert found["refused"]
    assert found["code"] == 0


@pytest.mark.slow
def test_the_other_tests_pass_without_the_kind(without: Path) -> None:
    of_kinds = without / "test_kinds.py"
    of_kinds.write_text(
        "from pytest_mistral_lora.chat.kinds.registry import KINDS\n\n\n"
        "def test_the_kind_is_not_there():\n"
        "    assert 'fim' not in KINDS\n"
    )
    done = run_tests_in(without, [str(of_kinds), *(str(ROOT / name) for name in OTHER_TESTS)])
    assert done.returncode == 0, done.stdout[-4000:]
