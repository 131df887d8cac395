"""What docs/releases.md says is true under the versions that run, and a library that does not fit is named."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest
from converted import converted_tokenizer
from forked import run_forked
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from page_sections import section

from pytest_mistral_lora.chat.oracle import VERSION, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.oracle.versions import EXACT_TEMPLATES, SUPPORTED
from pytest_mistral_lora.errors import LibraryError

ROOT = Path(__file__).parents[1]
PAGE = section("releases.md", "Guard a library upgrade")
CLEAN = {key: value for key, value in os.environ.items() if key not in ("CI", "PYTEST_ADDOPTS")}
RunPytest = Callable[..., pytest.RunResult]
MERGES_BY_ID = SpecifierSet(">=5,<5.24")
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def commands() -> list[list[str]]:
    """Return the words after `pytest --mistral-golden` of every such command on the page."""
    lines = re.findall(r"^\$ pytest --mistral-golden(.*)$", PAGE, flags=re.MULTILINE)
    return [re.findall(r'"[^"]*"|\S+', line.partition("  #")[0]) for line in lines]


def requirement(name: str) -> Requirement:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(one for one in map(Requirement, project["dependencies"]) if one.name == name)


def environments() -> list[str]:
    """Return the environments of the matrix, from tox.ini."""
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini")
    [section] = [name for name in tox.sections() if name.startswith("testenv:upgrade-")]
    return [f"upgrade-{pair}" for pair in re.findall(r"tf\d+-mc\w+", section)]


def test_the_difference_is_there_under_the_versions_that_the_page_names(run_pytest: RunPytest) -> None:
    affected = version("transformers") in MERGES_BY_ID
    result = run_pytest("--mistral-golden", "-k", "spm-v3 and double-spaces")
    assert result.ret == int(affected)
    [shown] = re.findall(r"<!-- red: start -->\n```text\n(.*?)```\n<!-- red: end -->", PAGE, flags=re.DOTALL)
    versions = re.compile(r"^  (recorded|running): .*$", flags=re.MULTILINE)
    assert (versions.sub("", shown) in versions.sub("", result.stdout.str())) is affected
    assert ("\nknown of transformers " in result.stdout.str()) is affected
    [running] = re.findall(r"^  running: .* transformers ([^,\s]+)", shown, flags=re.MULTILINE)
    assert running in MERGES_BY_ID
    assert ["-k", '"spm-v3 and double-spaces"'] in commands()


def test_the_commands_for_own_goldens_work(run_pytest: RunPytest, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "my-mistral"
    converted_tokenizer("spm-v3").fast.save_pretrained(folder)
    shutil.copy(shipped_tokenizer("spm-v3"), folder / "tokenizer.model.v3")
    (tmp_path / "tests" / "goldens").mkdir(parents=True)
    row = '{"name": "mine", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "tests" / "goldens" / "rows.jsonl").write_text(row)
    own = [words for words in commands() if "--mistral-golden-dir" in words]
    assert ["--mistral-golden-update" in words for words in own] == [True, False]
    for words in own:
        result = run_pytest("--mistral-golden", *words, "-k", "own-")
        assert result.ret == 0
        assert result.parseoutcomes()["passed"] == 1


def test_every_environment_of_the_matrix_has_its_line_on_the_page() -> None:
    names = environments()
    assert len(names) > 4
    assert [name for name in names if f"`{name}`" not in PAGE] == []
    assert sorted(re.findall(r"^\| `(upgrade-[^`]+)`", PAGE, flags=re.MULTILINE)) == sorted(names)


def test_the_oldest_supported_versions_are_the_same_everywhere() -> None:
    assert requirement("mistral-common").specifier == SUPPORTED
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    for name in ("mistral-common", "transformers"):
        specifier = str(requirement(name).specifier)
        assert f"`{name}{specifier}`" in PAGE
        assert f"{name}=={specifier.removeprefix('>=')}" in tox
    assert version("transformers") in requirement("transformers").specifier


def test_a_name_that_mistral_common_no_longer_has_is_said_with_the_versions_that_have_it(tmp_path: Path) -> None:
    gone = "get_normalizer"
    module = "mistral_common.protocol.instruct.normalize"
    (tmp_path / "conftest.py").write_text(f"import {module} as moved\n\ndel moved.{gone}\n")
    command = [sys.executable, "-m", "pytest", "--mistral-golden", "-p", "no:cacheprovider"]
    process = run_forked(command, cwd=tmp_path, env=CLEAN)
    assert process.returncode == pytest.ExitCode.INTERRUPTED
    assert f"mistral-common {VERSION} lacks an API" in process.stdout
    assert f"cannot import name '{gone}'" in process.stdout
    assert f"expected mistral-common{SUPPORTED}" in process.stdout
    assert f"pip install 'mistral-common{SUPPORTED}'" in process.stdout
    assert "Traceback" not in process.stdout + process.stderr


def test_generated_templates_are_not_checked_under_a_version_that_writes_other_ids(tmp_path: Path) -> None:
    # the version alone: tests/test_pinned_environments.py installs such versions
    (tmp_path / "conftest.py").write_text('import mistral_common\n\nmistral_common.__version__ = "1.12.0"\n')
    command = [sys.executable, "-m", "pytest", "--mistral-golden", "-p", "no:cacheprovider", "-k", "spm-v3::template"]
    process = run_forked(command, cwd=tmp_path, env={**CLEAN, "COLUMNS": "300"})
    assert process.returncode == pytest.ExitCode.OK
    [line] = [line for line in process.stdout.splitlines() if "generates chat templates with other ids" in line]
    assert "mistral-common 1.12.0" in line
    assert f"mistral-common{EXACT_TEMPLATES}" in line


def test_a_call_that_mistral_common_no_longer_takes_is_not_the_fault_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    normalizer = type(oracle._normalizer)
    monkeypatch.setattr(normalizer, "from_chat_completion_request", lambda self, request, policy: request)
    with pytest.raises(LibraryError, match=rf"mistral-common {re.escape(VERSION)} is not called as .*'policy'"):
        oracle.encode(ROW)
