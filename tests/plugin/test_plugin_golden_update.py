"""What recording writes over, and what it leaves alone."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from plugin_rows import ROW, write_rows

from pytest_mistral_lora.records.goldens import goldens_folder, load

Run = Callable[..., pytest.RunResult]
OwnRows = Callable[..., Path]
NAMED = {**ROW, "name": "prime"}
HELLO = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}], "name": "hello"}


def _update(golden: Run, folder: Path, *args: str) -> pytest.RunResult:
    return golden(f"--mistral-golden-dir={folder}", "-k", "spm-v3::template::own-", "--mistral-golden-update", *args)


def _file(folder: Path, name: str = "prime") -> Path:
    return folder / "templates" / "spm-v3" / f"{name}.json"


def _lines(result: pytest.RunResult, start: str) -> list[str]:
    return [line for line in result.outlines if line.startswith(start)]


@pytest.fixture
def recorded(golden: Run, own_rows: OwnRows) -> Path:
    folder = own_rows(NAMED)
    assert _update(golden, folder).ret == 0
    return folder


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_the_same_ids_under_other_versions_are_left_as_they_were_recorded(golden: Run, recorded: Path) -> None:
    old = {"mistral-common": "1.11.0", "transformers": "4.99.0", "tokenizers": "0.1"}
    _edit(_file(recorded), recorded_with=old)
    before = _file(recorded).read_bytes()
    assert _lines(_update(golden, recorded), "golden") == [
        f"golden unchanged: {_file(recorded)}",
        "goldens: 0 created, 0 rewritten, 1 unchanged",
    ]
    assert _file(recorded).read_bytes() == before


def test_a_moved_id_is_recorded_anew_and_the_description_is_kept(golden: Run, recorded: Path) -> None:
    data = json.loads(_file(recorded).read_text(encoding="utf-8"))
    ids, labels = list(data["input_ids"]), list(data["labels"])
    ids[2] += 1
    _edit(_file(recorded), input_ids=ids, labels=labels, description="Mine.")
    assert _lines(_update(golden, recorded), "golden r") == [f"golden rewritten: {_file(recorded)}"]
    assert list(load(_file(recorded)).encoded.input_ids) == data["input_ids"]
    assert load(_file(recorded)).description == "Mine."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"note": "mine"}, '$.note: "mine"'),
        pytest.param(
            {"case": "other"},
            "$.case: 'other', but the file is prime.json",
            marks=pytest.mark.slow,
        ),
        (
            {"tokenizer": {"file": "tekken.json", "version": "v3", "sha256": "ab" * 32}},
            "tekken.json abababababab",
        ),
    ],
)
def test_what_is_no_golden_of_this_tokenizer_is_not_written_over(
    change: dict[str, Any], said: str, golden: Run, recorded: Path
) -> None:
    _edit(_file(recorded), **change)
    before = _file(recorded).read_bytes()
    result = _update(golden, recorded)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    first, short = _lines(result, "ML001")
    assert first.startswith(f"ML001 {_file(recorded)}: ")
    assert said in first
    assert short.startswith("ML001 ")
    result.stdout.fnmatch_lines(["  expected: * remove it *"])
    assert _file(recorded).read_bytes() == before
    _file(recorded).unlink()
    assert _lines(_update(golden, recorded), "golden c") == [f"golden created: {_file(recorded)}"]


def test_the_packaged_goldens_are_never_rewritten(golden: Run, pytester: pytest.Pytester) -> None:
    (pytester.path / "link").symlink_to(goldens_folder(), target_is_directory=True)
    for folder in (goldens_folder(), Path("link")):
        result = _update(golden, folder)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        error = result.stderr.str().strip()
        assert error.startswith(f"ERROR: --mistral-golden-update: {folder} ")
        assert "packaged" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error_by_name(golden: Run, own_rows: OwnRows) -> None:
    folder = own_rows(NAMED)
    folder.chmod(0o555)
    result = _update(golden, folder)
    result.stdout.fnmatch_lines([f"ML007 {_file(folder)}: cannot be written: Permission denied"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_file_where_a_folder_must_be_is_an_error_by_name(golden: Run, own_rows: OwnRows) -> None:
    folder = own_rows(NAMED)
    (folder / "templates").write_text("")
    result = _update(golden, folder)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"ML007 {_file(folder)}: cannot be written: Not a directory"])
    result.stdout.no_fnmatch_line("*Traceback*")


KILLER = """
import os
import signal
from pathlib import Path

replace, done = Path.replace, []


def dying(self, target):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(target)
    return replace(self, target)


Path.replace = dying
"""


def test_a_run_that_is_killed_leaves_each_file_whole(golden: Run, recorded: Path, pytester: pytest.Pytester) -> None:
    write_rows(recorded / "rows.jsonl", [NAMED, HELLO])
    assert _update(golden, recorded).ret == 0
    files = [_file(recorded, "hello"), _file(recorded)]
    before = [file.read_bytes() for file in files]
    messages = [{"role": "user", "content": "Another question?"}, ROW["messages"][1]]
    write_rows(recorded / "rows.jsonl", [{**row, "messages": messages} for row in (NAMED, HELLO)])
    pytester.makeconftest(KILLER)  # the second file is written, and not yet where it belongs
    command = [sys.executable, "-m", "pytest", "--mistral-golden", f"--mistral-golden-dir={recorded}"]
    command += ["--mistral-golden-update", "-k", "spm-v3::template::own-"]
    killed = run_forked(command, cwd=pytester.path)
    assert killed.returncode == -signal.SIGKILL
    assert [file.read_bytes() == old for file, old in zip(files, before, strict=True)] == [False, True]
    assert [load(file).case for file in files] == ["hello", "prime"]
    [left] = {*files[0].parent.iterdir()} - {*files}
    # a part that was written to lately may have a writer: remove_temporaries leaves it
    os.utime(left, times=(0, 0))
    (pytester.path / "conftest.py").unlink()
    assert f"golden rewritten: {files[1]}" in _lines(_update(golden, recorded), "golden ")
    assert sorted(files[0].parent.iterdir()) == files


def test_a_golden_without_its_row_is_said_and_kept(golden: Run, recorded: Path) -> None:
    write_rows(recorded / "rows.jsonl", [HELLO])
    created, unchanged = _lines(_update(golden, recorded), "golden ")
    assert created == f"golden created: {_file(recorded, 'hello')}"
    assert unchanged.startswith(f"golden unchanged: {_file(recorded)} (no row ")
    assert _file(recorded).is_file()
    (recorded / "rows.jsonl").unlink()
    assert f"golden unchanged: {_file(recorded)}" in _lines(_update(golden, recorded), "golden ")


def test_goldens_that_no_target_judges_are_said(golden: Run, recorded: Path) -> None:
    (recorded / "templates" / "spm-v3").rename(recorded / "templates" / "renamed")
    (recorded / "templates" / "empty").mkdir()
    result = golden(f"--mistral-golden-dir={recorded}", "-k", "spm-v1::tokenizer::file")
    [line] = _lines(result, "  " + str(recorded))
    assert line.startswith(f"  {recorded}/templates/renamed: ")


def test_nothing_chosen_is_nothing_recorded(golden: Run, own_rows: OwnRows) -> None:
    folder = own_rows(NAMED)
    result = _update(golden, folder, "-k", "spm-v1::tokenizer::file")
    assert "goldens: 0 created, 0 rewritten, 0 unchanged" in result.outlines
