from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_mistral_lora.plugin import options

CONFTEST = """
import atexit
import json
import pathlib
import subprocess
import sys


def pytest_unconfigure(config):
    atexit.register(lambda: pathlib.Path("modules.json").write_text(json.dumps(sorted(sys.modules))))
"""
OURS = ("pytest_mistral_lora", "pytest_mistral_lora.plugin")
QUIET = ("-p", "no:xdist", "-p", "no:hypothesispytest", "-p", "no:anyio")


@pytest.fixture
def session(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("def test_mine(): pass")
    return pytester


def _modules(session: pytest.Pytester, *args: str) -> set[str]:
    """Return what is imported when the process ends."""
    session.runpytest_subprocess(*args).assert_outcomes(passed=1)
    return set(json.loads((session.path / "modules.json").read_text()))


def _added(session: pytest.Pytester, *args: str) -> set[str]:
    """Return the modules that the plugin adds, but for its own light ones, the standard library's and pytest's."""
    without = _modules(session, "-p", "no:mistral_lora", *args)
    assert not any(name.startswith("pytest_mistral_lora") for name in without)
    added = _modules(session, *args) - without
    assert "pytest_mistral_lora.plugin" in added
    return {name for name in added if not _is_light(name)}


def _is_light(name: str) -> bool:
    if name in OURS or name.startswith("pytest_mistral_lora.plugin."):
        return True
    return name.partition(".")[0] in sys.stdlib_module_names | {"pytest", "_pytest", "pluggy", "iniconfig", "packaging"}


@pytest.mark.parametrize(
    "args",
    [(), QUIET, pytest.param(("-v", "--junitxml=x.xml"), marks=pytest.mark.slow)],
    ids=["usual", "alone", "verbose"],
)
def test_an_inactive_plugin_imports_the_standard_library_and_pytest_only(
    args: tuple[str, ...], session: pytest.Pytester
) -> None:
    assert _added(session, *args) == set()


def test_an_inactive_plugin_imports_few_modules_of_its_own(session: pytest.Pytester) -> None:
    names = {name for name in _modules(session) if name.startswith("pytest_mistral_lora")}
    assert names == {"pytest_mistral_lora", "pytest_mistral_lora.plugin", "pytest_mistral_lora.plugin.options"}


def test_the_option_table_is_added_in_few_calls() -> None:
    """Guard the cost of a run that does not use the suite without a clock: calls of Python functions."""
    from _pytest.config import get_config

    parser = get_config()._parser
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        options.add(parser)
    finally:
        sys.setprofile(None)
    [group] = [group for group in parser._groups if group.name == "mistral"]
    assert len(group.options) == len(options.OPTIONS)
    # without `dest`, pytest compares each option with all others: more than 150 calls each
    assert calls < 60 * len(options.OPTIONS)


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param("pytest_configure(config)", marks=pytest.mark.slow),
        "pytest_unconfigure(config)",
        pytest.param("pytest_terminal_summary()", marks=pytest.mark.slow),
    ],
)
def test_a_heavy_import_in_any_hook_is_found(hook: str, session: pytest.Pytester) -> None:
    code = f"import pytest_mistral_lora.plugin\n\n\ndef {hook}:\n    import numpy\n"
    session.makepyfile(heavy=code)
    session.makeini("[pytest]\npythonpath = .")
    without = _modules(session, "-p", "no:mistral_lora", *QUIET)
    heavy = _modules(session, "-p", "heavy", *QUIET) - without
    assert "numpy" in {name for name in heavy if not _is_light(name)}


def test_importing_the_package_imports_nothing_heavy(pytester: pytest.Pytester) -> None:
    code = (
        "import sys; before = set(sys.modules); import pytest_mistral_lora; print(*sorted(set(sys.modules) - before))"
    )
    result = pytester.run(sys.executable, "-c", code)
    names = result.outlines[0].split()
    assert [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names] == ["pytest_mistral_lora"]


ENCODED = """
import sys
from pytest_mistral_lora import Oracle, Row
from pytest_mistral_lora.training.rows.dataset import ColumnBuilder, RowTable
import pytest_mistral_lora.training.rows.loading
import pyarrow

row = Row.from_dict({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
columns = ColumnBuilder()
columns.add(Oracle.load("spm-v3").encode(row), 1, b"{}")
table = RowTable(pyarrow.Table.from_batches([columns.batch(0)]))
print(table.values("input_ids", 0).tolist(), table.line(0), {"torch", "pandas"} & set(sys.modules))
"""


def test_the_rows_of_a_run_are_encoded_without_torch_and_pandas() -> None:
    """Each process of a pool that encodes rows would import them, and every command that only reads rows."""
    done = subprocess.run([sys.executable, "-c", ENCODED], capture_output=True, text=True, check=True)
    assert done.stdout == "[1, 3, 16127, 4, 23325, 2] (0, 1, b'{}') set()\n"


COLLECTED = """
import sys
from pathlib import Path
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import SUBJECT_CHECKS, collect
from pytest_mistral_lora.conformance.targets import EncodedTarget

def imported():
    modules = sorted({module for module, _ in SUBJECT_CHECKS.values()})
    return [one for one in modules if f"pytest_mistral_lora.conformance.{one}" in sys.modules]

print(imported(), "mistral_common" in sys.modules)
settings = Settings(1, None, "cpu", False, (), False, Path())
assert list(collect([EncodedTarget("rows", Path("rows.jsonl"))], settings))
print(imported(), "torch" in sys.modules)
"""


def test_a_subject_is_imported_when_one_of_its_targets_is_collected() -> None:
    """A bad path, a help text or one file of rows must not wait for the libraries of all checks."""
    done = subprocess.run([sys.executable, "-c", COLLECTED], capture_output=True, text=True, check=True)
    # the rows of another trainer keep the laws of `mask`, too
    assert done.stdout.splitlines() == ["[] False", "['encoded.audit', 'mask.checks'] False"]


@pytest.mark.of_field
def test_a_missing_folder_and_a_broken_recipe_are_answered_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base:\n\tpath: base\n")
    (tmp_path / "lora").mkdir()
    commands = [
        ["smoke", "nolora"],
        ["smoke", "lora", "--base", "nobase"],
        ["smoke", "lora", "--rows", "none.jsonl"],
        ["merge", "nolora", "merged"],
        ["chat", "nolora"],
        ["check", "recipe.yaml"],
        ["train", "recipe.yaml"],
        ["export", "nolora", "--to", "vllm", "--output", "served"],
        ["export", "lora", "--to", "vllm", "--output", "served"],
        ["export", "lora", "--to", "llamacpp", "--output", "lora-served"],
        ["export", "recipe.yaml", "--to", "ollama", "--output", "served"],
        ["export", "recipe.yaml", "--to", "trl", "--output", "run"],
        ["export", "lora", "--to", "axolotl", "--output", "run"],
    ]
    script = (
        "import json, sys\nfrom pytest_mistral_lora.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    assert main(words) == 2, words\n"
        "    heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    command = [sys.executable, "-c", script, json.dumps(commands)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pytest_does_not_compile_the_package_and_hypothesis_for_their_assertions(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
        import json, pathlib, sys

        def pytest_sessionfinish():
            loaders = {name: type(module.__loader__).__name__ for name, module in sys.modules.items()
                       if name.startswith(("pytest_mistral_lora.", "hypothesis."))}
            pathlib.Path("loaders.json").write_text(json.dumps(loaders))
    """)
    result = pytester.runpytest_subprocess("--mistral-golden", "-q", "-k", "spm-v1 and only-the-assistant")
    assert result.ret == 0
    loaders = json.loads((pytester.path / "loaders.json").read_text())
    # before the run is known to use the suite
    early = {"plugin", "options", "process"}
    compiled = {name for name, loader in loaders.items() if loader == "AssertionRewritingHook"}
    assert {"pytest_mistral_lora.plugin.suite", "hypothesis.core"} <= loaders.keys()
    assert {name.rpartition(".")[2] for name in compiled} <= early


def test_a_run_of_the_suite_collects_garbage_less_often_up_to_its_end(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
        import gc, pathlib

        def pytest_collection_finish():
            pathlib.Path("threshold").write_text(str(gc.get_threshold()[0]))
    """)
    before = gc.get_threshold()
    for words, expected in ((["--mistral-golden"], 100_000), ([], before[0])):
        assert pytester.runpytest_inprocess(*QUIET, *words, "--collect-only", "-q", "-k", "bos-once").ret in (0, 5)
        assert int((pytester.path / "threshold").read_text()) == expected
        assert gc.get_threshold() == before
