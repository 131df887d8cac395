"""Without `field`, the judge and the trainer do all that they do with it; what is known of programs is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from package_copy import PACKAGE, ROOT, copied_without, run_in, run_tests_in

from pytest_mistral_lora.cli import main

CODE = """
import contextlib, importlib, io, json, pkgutil, sys
import pytest_mistral_lora
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.cli.program import VERBS
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.programs.facts import facts
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.serving.servers import SERVERS

for module in pkgutil.walk_packages(pytest_mistral_lora.__path__, "pytest_mistral_lora."):
    # training imports torch
    is_heavy = module.name.startswith("pytest_mistral_lora.training.") and "rows" not in module.name
    if not is_heavy and not module.name.endswith("__main__") and ".scripts" not in module.name:
        importlib.import_module(module.name)
helps = {}
for verbs in VERBS.values():
    for verb in verbs:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main([verb, "--help"])
        helps[verb] = len(out.getvalue())
with contextlib.redirect_stdout(io.StringIO()) as out:
    codes = [main(["check", "rows.jsonl", "--tokenizer", "spm-v3"])]
with contextlib.redirect_stderr(io.StringIO()) as errors:
    codes.append(main(["check", "--runner", "trl", "--tokenizer", "spm-v3"]))
print(json.dumps({
    "file": pytest_mistral_lora.__file__,
    "trainers": [*TRAINERS],
    "servers": [*SERVERS],
    "rules": [*RULES],
    "faults": [fault.id for fault in facts()],
    "helps": helps,
    "codes": codes,
    "errors": errors.getvalue(),
}))
"""
ROWS = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
OF_FIELD = ("field", "runners", "serving", "browser", "fuzz", "mutants", "test_docs")
"""Folders of tests about programs, those that are run apart, and the pages of the site, which name programs."""
MARKED = "not real and not gallery and not slow and not vllm and not browser"
"""The tests that a plain run takes: an option `-m` replaces that of the settings."""


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a copy of the package without `field`."""
    folder = tmp_path_factory.mktemp("without")
    copied_without(folder, "field")
    (folder / "rows.jsonl").write_text(json.dumps(ROWS) + "\n")
    return folder


def test_the_judge_knows_no_program_and_judges_as_before(without: Path) -> None:
    done = run_in(without, "-c", CODE)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["file"] == str(without / PACKAGE.name / "__init__.py")
    assert (found["trainers"], found["servers"], found["faults"]) == ([], ["openai"], [])
    assert "ML543" in found["rules"]
    assert not {"ML426", "ML427", "ML657", "ML915", "ML920", "ML023"} & {*found["rules"]}
    assert all(found["helps"].values()), found["helps"]
    as_before = [main(["check", str(without / "rows.jsonl"), "--tokenizer", "spm-v3"])]
    assert found["codes"] == [*as_before, 2]
    assert "'trl' is not a runner" in found["errors"]


def _has_tests(path: Path) -> bool:
    return path.match("test_*.py") or (path.is_dir() and any(path.glob("test_*.py")))


@pytest.mark.slow
def test_the_tests_of_the_judge_and_the_trainer_pass(without: Path) -> None:
    chosen = [
        str(path) for path in sorted((ROOT / "tests").iterdir()) if path.stem not in OF_FIELD and _has_tests(path)
    ]
    done = run_tests_in(without, chosen, "-n", "2", "-m", f"({MARKED}) and not of_field")
    assert done.returncode == 0, done.stdout[-8000:]
