"""The public names have types, for type checkers and so for editors."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import pytest_mistral_lora

CONFIGURATION = """\
[mypy]
strict = true
follow_imports = skip
# a decorator of a package that is left out has no type
disallow_untyped_decorators = false

[mypy-pytest_mistral_lora.*]
follow_imports = silent
"""
"""Other packages are left out: following torch takes a minute, and no public name has a type of another package."""

ROOT = Path(__file__).parents[1]
GIVEN = dict.fromkeys(
    ["README.md", "guard.md"],
    "from typing import Any\ntrainer: Any = None\nmodel = tokenizer = loader = optimizer = trainer\n",
)
"""What the examples of a page take as given, by its name: the trainer of the reader, or the parts of a loop."""

IMPORTS = """\
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, assert_type

from pytest_mistral_lora import CheckpointTokenizer, EncodedRow, Finding, Golden, Oracle, Row, RunResult, Span, TinyRun
from pytest_mistral_lora import Verdict, audit, judge, read_rows, train, training_template

"""
USER = """\
oracle = Oracle(Path("tekken.json"))
assert_type(oracle.path, Path)
assert_type(oracle.kind, Literal["spm", "tekken"])
assert_type(oracle.vocab_size, int)
assert_type(oracle.control_tokens, Mapping[int, str])
assert_type(read_rows("rows.jsonl"), Iterator[Row])
assert_type(training_template("checkpoint"), str)
assert_type(Oracle.load("spm-v3"), Oracle)
assert_type(Row.from_dict({"messages": []}), Row)
assert_type(CheckpointTokenizer(Path("checkpoint")).oracle, Oracle)
assert_type(train("recipe.yaml", resume=True), RunResult)
assert_type(train("recipe.yaml").output, Path)
verdict = judge("rows.jsonl", Path("lora-out"), tokenizer="spm-v3", base="base", train=False)
assert_type(verdict, Verdict)
assert_type(audit([{"input_ids": [1]}], tokenizer=Path("checkpoint"), dataset=["rows.jsonl"]), Verdict)
assert_type(verdict.ok, bool)
assert_type(verdict.findings, tuple[Finding, ...])
assert_type(verdict.findings[0].severity, Literal["error", "note"])
assert_type(verdict.findings[0].next_step, str)
assert_type(verdict.not_checked, Mapping[str, str])
assert_type(verdict.write("report.html"), Path)
def of_fixtures(mistral_golden: Golden, mistral_lora_run: TinyRun) -> None:
    assert_type(mistral_golden.encoded, EncodedRow)
    assert_type(mistral_lora_run.adapter, Path)
for row in read_rows("rows.jsonl"):
    assert_type(row.messages, tuple[Mapping[str, Any], ...])
    encoded = oracle.encode(row)
    assert_type(encoded, EncodedRow)
    assert_type(encoded.input_ids, tuple[int, ...])
    assert_type(encoded.labels, tuple[int, ...] | None)
    assert_type(encoded.spans, tuple[Span, ...])
    assert_type(encoded.spans[0].turn, int | None)
    assert_type(encoded.spans[0].kind, Literal["control", "text", "tool_call", "eos"])
"""


def errors_of_modules(folder: Path, modules: Mapping[str, str]) -> list[str]:
    pytest.importorskip("mypy", reason="mypy is not installed")
    (folder / "mypy.ini").write_text(CONFIGURATION)
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)
    files = [str(folder / f"{name}.py") for name in modules]
    words = ["--config-file", str(folder / "mypy.ini"), "--cache-dir", str(folder / "cache"), "--no-error-summary"]
    # a process of its own: mypy keeps 130 MB of what it has read
    done = subprocess.run([sys.executable, "-m", "mypy", *words, *files], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout.splitlines()


def examples_of_pages() -> dict[str, str]:
    """Return the Python examples of each page, one after the other: a later one uses the names of an earlier one."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
    blocks = {
        page: re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for page in pages
    }
    return {
        "_".join(page.relative_to(ROOT).with_suffix("").parts): GIVEN.get(page.name, "") + "\n".join(found)
        for page, found in blocks.items()
        if found
    }


WRONG = {
    "assert_type(read_rows('x'), Iterator[EncodedRow])": "[assert-type]",
    "import pytest_mistral_lora; pytest_mistral_lora.Rows": "[attr-defined]",
    "Oracle('tekken.json').encode(3)": "[arg-type]",
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of mypy for what is right and what is wrong, in one call: most of its time is for this package."""
    examples = examples_of_pages()
    assert {"README", "docs_guard", "docs_api", "docs_suite"} <= examples.keys()
    modules = {"user": IMPORTS + USER, "wrong": IMPORTS + "\n".join(WRONG) + "\n", **examples}
    return errors_of_modules(tmp_path_factory.mktemp("typing"), modules)


def of_wrong_uses(line: str) -> bool:
    return "wrong.py:" in line


def test_every_public_name_and_every_example_of_the_pages_has_its_type(errors: list[str]) -> None:
    assert [line for line in errors if not of_wrong_uses(line)] == []


def test_each_wrong_use_is_an_error(errors: list[str]) -> None:
    found = [line for line in errors if of_wrong_uses(line) and ": error: " in line]
    assert [line.rpartition(" ")[2] for line in found] == list(WRONG.values())


def test_type_checkers_read_the_types_of_the_installed_package() -> None:
    assert (Path(pytest_mistral_lora.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", pytest_mistral_lora.__all__)
def test_every_public_name_is_loaded_on_first_use(name: str) -> None:
    assert getattr(pytest_mistral_lora, name) is not None


def test_another_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Rows'"):
        _ = pytest_mistral_lora.Rows
