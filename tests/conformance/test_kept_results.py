"""Checks that passed are not run again if nothing that they read has changed, and are run again if anything has."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from forked import run_forked

from pytest_mistral_lora.chat.diff import ShownToken
from pytest_mistral_lora.chat.token_rows import Column, TokenRow
from pytest_mistral_lora.conformance import kept_results
from pytest_mistral_lora.conformance.collection import SUBJECT_CHECKS
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.kept_results import INPUTS, KeptResults
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records import files, trust
from pytest_mistral_lora.report.pages import tokens_html
from pytest_mistral_lora.starter import write_plan
from pytest_mistral_lora.starter.plan import plan_start

RunVerb = Callable[..., subprocess.CompletedProcess[str]]

DEFAULT_FOLDER = kept_results.default_folder
"""The real one: the tests have another, so that none of them finds the results of an earlier one."""

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SOUND = json.dumps({"messages": TALK}) + "\n"
BROKEN = '{"messages": [{"role": "bot", "content": "Hi"}]}\n'


def entries(folder: Path) -> list[Path]:
    """Return the results that a folder has, without the notes on green runs."""
    return [file for file in folder.iterdir() if not file.name.startswith("green-")]


@pytest.fixture
def rows(tmp_path: Path, tiny_base: Path) -> Path:
    """A file of rows beside a copy of a base, whose files a test may change."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in tiny_base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "rows.jsonl"
    file.write_text(SOUND)
    return file


@pytest.fixture
def check_rows(rows: Path, mistral_lora: RunVerb) -> Callable[..., tuple[int, int]]:
    """Check the rows, and return the exit code and the number of checks from the cache."""

    def check(*words: str) -> tuple[int, int]:
        options = words or ("--cache", "kept")
        done = mistral_lora("check", "rows.jsonl", "--tokenizer", "base", *options, folder=rows.parent)
        return done.returncode, from_cache(done.stdout)

    return check


def from_cache(output: str) -> int:
    found = re.search(r"^(\d+) checks? from the cache", output, flags=re.MULTILINE)
    return int(found[1]) if found else 0


def test_a_second_run_says_what_the_first_one_said(rows: Path, mistral_lora: RunVerb) -> None:
    command = ("check", "rows.jsonl", "--tokenizer", "base", "--cache", "kept")
    first, second = (mistral_lora(*command, folder=rows.parent) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0)
    assert from_cache(first.stdout) == 0
    assert from_cache(second.stdout) > 10
    lines = [line for line in second.stdout.splitlines() if "from the cache" not in line]
    assert lines == first.stdout.splitlines()


def append_row(rows: Path) -> None:
    with rows.open("a") as file:
        file.write(SOUND.replace("Hello", "Good day"))


def replace_text(rows: Path) -> None:
    """Change a file and keep its size and its time."""
    before = rows.stat()
    rows.write_text(rows.read_text().replace("Hello", "Hullo"))
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_base(rows: Path) -> None:
    file = rows.parent / "base" / "config.json"
    file.write_text(file.read_text() + " ")


def add_file(rows: Path) -> None:
    (rows.parent / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}")


@pytest.mark.parametrize("change", [append_row, replace_text, change_base, add_file])
def test_a_changed_file_is_judged_again(
    change: Callable[[Path], None], rows: Path, check_rows: Callable[..., tuple[int, int]]
) -> None:
    check_rows()
    assert check_rows()[1] > 10
    change(rows)
    assert check_rows()[1] == 0


def test_a_large_file_is_judged_again_even_if_its_size_and_its_time_are_the_same(
    rows: Path, check_rows: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_results, "_LARGE", 10)
    # a file that has just changed may change again without another state
    check_rows()
    assert check_rows()[1] == 0
    monkeypatch.setattr(kept_results, "_UNSETTLED", 0)
    check_rows()
    assert check_rows()[1] > 10
    replace_text(rows)
    assert check_rows()[1] == 0


def test_another_version_option_or_variable_is_judged_again(
    rows: Path, check_rows: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rows()
    assert check_rows()[1] > 10
    assert check_rows("--cache", "kept", "--examples", "3")[1] == 0
    check_rows()
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    assert check_rows()[1] == 0
    assert check_rows()[1] > 10
    # a token opens the Hub, and changes no verdict; it is not among what an entry is made of
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert check_rows()[1] > 10
    (rows.parent / "site" / "other-1.0.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(rows.parent / "site")
    assert check_rows()[1] == 0
    assert check_rows()[1] > 10
    (rows.parent / "site" / "other-1.0.dist-info").rename(rows.parent / "site" / "other-1.1.dist-info")
    assert check_rows()[1] == 0


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library beside those of ids: a copy of one of them, whose files a test may change."""
    assert {"mistral_common", "transformers", "tokenizers", "jinja2"} <= set(kept_results._LIBRARIES)
    monkeypatch.setattr(kept_results, "_LIBRARIES", ("copied", *kept_results._LIBRARIES))
    folder = tmp_path / "site" / "copied"
    shutil.copytree(Path(jinja2.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def _install(library: Path, *, editable: bool = False) -> None:
    info = library.with_name("copied-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: copied\nVersion: 1.0\n")
    if editable:
        (info / "direct_url.json").write_text('{"url": "file:///src", "dir_info": {"editable": true}}')


def test_a_library_that_was_edited_in_place_is_judged_again(
    rows: Path, library: Path, check_rows: Callable[..., tuple[int, int]]
) -> None:
    _install(library)
    check_rows()
    assert check_rows()[1] > 10
    source = library / "filters.py"
    source.write_text(source.read_text().replace("    ", "\t", 1).replace("\t", "    ", 1))  # the same content, later
    assert check_rows()[1] == 0
    assert check_rows()[1] > 10
    (library / "more.py").touch()
    assert check_rows()[1] == 0
    assert check_rows()[1] > 10
    # what Python compiles says nothing new
    (library / "__pycache__").mkdir()
    (library / "__pycache__" / "filters.cpython-311.pyc").touch()
    assert check_rows()[1] > 10


@pytest.mark.parametrize("installed", [True, False])
def test_a_library_of_a_folder_of_sources_is_compared_by_content(
    installed: bool, rows: Path, library: Path, check_rows: Callable[..., tuple[int, int]]
) -> None:
    if installed:
        _install(library, editable=True)
    check_rows()
    assert check_rows()[1] > 10
    source = library / "filters.py"
    before = source.stat()
    source.write_text(source.read_text())
    assert check_rows()[1] > 10
    # the same size and time, as of a checkout
    source.write_text(source.read_text().replace("return", "returm", 1))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert check_rows()[1] == 0


@pytest.mark.parametrize(
    "name", ["USE_TORCH", "TIKTOKEN_CACHE_DIR", "DISABLE_TELEMETRY", "LANG", "MISTRAL_LORA_PROCESSES"]
)
def test_a_variable_that_a_library_reads_is_judged_again(
    name: str, check_rows: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    check_rows()
    assert check_rows()[1] > 10
    monkeypatch.setenv(name, "2")
    assert check_rows()[1] == 0


def test_another_window_finds_the_results(
    check_rows: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rows()
    for name in ("COLUMNS", "OLDPWD", "SSH_CONNECTION", "TERM_SESSION_ID", "TMUX_PANE", "VSCODE_IPC_HOOK_CLI", "_"):
        monkeypatch.setenv(name, "of the window")
    assert check_rows()[1] > 10


def test_a_red_check_is_judged_in_each_run(rows: Path, check_rows: Callable[..., tuple[int, int]]) -> None:
    check_rows()
    rows.write_text(SOUND + BROKEN)
    assert [check_rows(), check_rows()] == [(1, 0), (1, 0)]
    rows.write_text(SOUND)
    # the entry of the first run still fits
    assert check_rows()[0] == 0
    assert check_rows()[1] > 10


def test_a_damaged_entry_is_written_again(rows: Path, check_rows: Callable[..., tuple[int, int]]) -> None:
    check_rows()
    [entry] = entries(rows.parent / "kept")
    text = entry.read_text()
    forged = text.replace('"not_checked": ""', '"not_checked": "forged"', 1)
    for damaged in ("", text[:100], "[]", "{}", text.replace('"findings": []', '"findings": [1]', 1), forged):
        assert damaged != text
        entry.write_text(damaged)
        assert check_rows() == (0, 0)
        assert check_rows()[1] > 10


def test_an_entry_is_kept_for_thirty_days(rows: Path, check_rows: Callable[..., tuple[int, int]]) -> None:
    kept = rows.parent / "kept"
    kept.mkdir(mode=0o700)
    for name, days in (("older", 30.01), ("younger", 29.99)):
        file = kept / f"{name}.json"
        file.write_text("{}")
        os.utime(file, times=(time.time(), time.time() - days * 86_400))
    assert check_rows() == (0, 0)
    assert not (kept / "older.json").exists()
    assert (kept / "younger.json").exists()


def test_an_entry_of_another_target_is_not_believed(
    rows: Path, check_rows: Callable[..., tuple[int, int]], mistral_lora: RunVerb
) -> None:
    check_rows()
    folder = rows.parent / "kept"
    [sound] = entries(folder)
    bad = rows.with_name("bad.jsonl")
    bad.write_text(rows.read_text().splitlines()[0] + "\n")
    words = ("check", bad.name, "--tokenizer", "base", "--cache", "kept")
    mistral_lora(*words, folder=rows.parent)
    [entry] = {*entries(folder)} - {sound}
    bad.write_text(rows.read_text().replace('"user"', '"usr"'))
    # its seal is right, and its inputs have not changed
    entry.write_bytes(sound.read_bytes())
    done = mistral_lora(*words, folder=rows.parent)
    assert done.returncode == 1
    assert "ML601" in done.stdout
    assert "from the cache" not in done.stdout


def test_a_seal_of_another_user_is_not_believed(rows: Path, check_rows: Callable[..., tuple[int, int]]) -> None:
    check_rows()
    assert check_rows()[1] > 10
    [entry] = entries(rows.parent / "kept")
    data = json.loads(entry.read_text())
    for key in (b"", b"0" * 32):
        forged = {**data, "seal": trust.seal(kept_results._framed(data["content"]), key)}
        entry.write_text(json.dumps(forged))
        assert check_rows() == (0, 0)
    # an entry that is carried to a user with another key
    trust.key_file().unlink()
    assert check_rows()[1] == 0
    assert trust.key_file().stat().st_mode & 0o777 == 0o600
    assert check_rows()[1] > 10


def _wrong_types(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the content of an entry with a value of another type, or none, in each place down to the tokens."""
    junk: tuple[Any, ...] = (None, 3, 1e308, "text", [], {}, [None], {"a": [1]}, True, "\0", "\ud800", [[[]]])

    def changed(value: Any, depth: int) -> Iterator[Any]:
        yield from (other for other in junk if other != value or type(other) is not type(value))
        if depth and isinstance(value, dict):
            for name in [*value][:12]:
                yield {key: item for key, item in value.items() if key != name}
                yield from ({**value, name: other} for other in changed(value[name], depth - 1))
        if depth and isinstance(value, list) and value:
            yield from ([other, *value[1:]] for other in changed(value[0], depth - 1))

    for name in content:
        if name != "key":
            yield from ({**content, name: other} for other in changed(content[name], 9))


def test_a_result_of_another_type_is_judged_again(
    rows: Path, check_rows: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of another version, whose seal is right: whatever is in it, no traceback, and no result of another form."""
    check_rows()
    [entry] = entries(rows.parent / "kept")
    content = json.loads(entry.read_text())["content"]
    column = Column((ShownToken(0, 1, "<s>", "train", True), None), ">", 0, "user")
    note = Finding("ML428", "a note", Place.of("rows.jsonl", 1), tokens=TokenRow("rows.jsonl:1", ("a", "b"), (column,)))
    content["checks"][0] |= {"findings": [note.to_json()], "facts": {"rows": 1}}
    content = json.loads(json.dumps(content))
    kept = KeptResults(rows.parent / "kept")
    written, key = entry, content["key"]
    monkeypatch.chdir(rows.parent)
    tried = 0
    for wrong in (content, *_wrong_types(content)):
        sealed = trust.seal(kept_results._framed(wrong), trust.user_key())
        written.write_text(json.dumps({"content": wrong, "seal": sealed}))
        found = kept._read(written, key)
        assert found is not None or tried
        tried += 1
        for _, case, result in found.results if found else ():
            assert isinstance(case, str)
            for finding in result.findings:
                assert isinstance(finding.text(), str)
                assert finding.tokens is None or tokens_html([finding.tokens])
    assert tried > 400


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="without owners and modes")
@pytest.mark.parametrize("place", ["kept", "."])
def test_a_folder_that_others_can_write_is_not_trusted(
    place: str, rows: Path, mistral_lora: RunVerb, check_rows: Callable[..., tuple[int, int]]
) -> None:
    check_rows()
    assert check_rows()[1] > 10
    shared = rows.parent / place
    shared.chmod(0o777)
    before = {file: file.stat().st_mtime_ns for file in (rows.parent / "kept").iterdir()}
    done = mistral_lora("check", "rows.jsonl", "--tokenizer", "base", "--cache", "kept", folder=rows.parent)
    assert (done.returncode, from_cache(done.stdout)) == (0, 0)
    [line] = [line for line in done.stdout.splitlines() if "not used" in line]
    assert f"other users can write {shared.resolve()} (mode 777)" in line
    assert {file: file.stat().st_mtime_ns for file in (rows.parent / "kept").iterdir()} == before
    if place == ".":
        # as /tmp is: what is mine in it stays mine
        shared.chmod(0o1777)
        assert check_rows()[1] > 10
    shared.chmod(0o755)
    assert check_rows()[1] > 10


def test_a_run_that_is_killed_while_it_writes_leaves_nothing(
    rows: Path, check_rows: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(handle: int) -> None:
        raise KeyboardInterrupt

    def write_and_die(path: Path, text: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", killed)
            files.write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(kept_results, "write_text", write_and_die)
        assert check_rows()[0] == 130
    assert list((rows.parent / "kept").iterdir()) == []
    assert check_rows() == (0, 0)


def test_ci_and_no_cache_keep_nothing(
    rows: Path, mistral_lora: RunVerb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("check", "rows.jsonl", "--tokenizer", "base")
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_results, "default_folder", DEFAULT_FOLDER)
    mistral_lora(*command, "--no-cache", folder=rows.parent)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("CI", "true")
    assert DEFAULT_FOLDER() is None
    monkeypatch.delenv("CI")
    mistral_lora(*command, folder=rows.parent)
    assert len(entries(tmp_path / "cache" / "results")) == 1
    assert from_cache(mistral_lora(*command, folder=rows.parent).stdout) > 10
    assert from_cache(mistral_lora(*command, "--no-cache", folder=rows.parent).stdout) == 0


def test_a_file_in_place_of_the_folder_is_refused(rows: Path, mistral_lora: RunVerb) -> None:
    (rows.parent / "kept").write_text("mine")
    done = mistral_lora("check", "rows.jsonl", "--tokenizer", "base", "--cache", "kept", folder=rows.parent)
    assert (done.returncode, "kept: is not a folder" in done.stderr) == (2, True)
    assert (rows.parent / "kept").read_text() == "mine"


@pytest.fixture
def recipe(rows: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(rows.parent)
    write_plan(plan_start(Path(), [Path("rows.jsonl")], "base", ()))
    return rows.parent / "recipe.yaml"


def test_a_change_of_rows_runs_the_checks_of_rows_alone(
    recipe: Path, rows: Path, mistral_lora: RunVerb, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipe.parent
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(folder / "kept"))
    hook = ("check", "recipe.yaml", "--examples", "1")
    command = (*hook, "--cache", "kept/results")
    first = mistral_lora(*command, "--json", folder=folder)
    assert first.returncode == 0, first.stdout
    checks = [check["subject"] for check in json.loads(first.stdout)["checks"]]
    assert from_cache(mistral_lora(*command, folder=folder).stdout) == len(checks)
    # a hook waits for what the command imports
    script = f"{_IMPORTED}\nmain({[*hook]})\nprint(json.dumps([name for name in HEAVY if name in sys.modules]))"
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True, timeout=300)
    assert (from_cache(done.stdout), done.stdout.splitlines()[-1]) == (len(checks), "[]")
    rows.write_text(SOUND + BROKEN)
    done = mistral_lora(*command, folder=folder)
    # the recipe itself is judged by a check of this subject
    assert (done.returncode, from_cache(done.stdout)) == (1, len(checks) - checks.count("dataset") + 1)
    rows.write_text(SOUND)
    recipe.write_text(recipe.read_text().replace("learning_rate: 2e-4", "learning_rate: 1e-4"))
    assert from_cache(mistral_lora(*command, folder=folder).stdout) == 0
    (folder / "lora-out").write_text("in the way")
    done = mistral_lora(*command, folder=folder)
    assert (done.returncode, "ML641" in done.stdout) == (1, True)


def test_rows_that_a_declaration_names_are_not_kept(recipe: Path, rows: Path, mistral_lora: RunVerb) -> None:
    declaration = rows.parent / "axolotl.yaml"
    declaration.write_text(
        "base_model: base\nchat_template: tokenizer_default\n"
        "datasets:\n  - path: rows.jsonl\n    type: chat_template\n    field_messages: messages\n"
    )
    recipe.write_text(recipe.read_text().replace("- rows.jsonl", "- path: axolotl.yaml"))
    command = ("check", "recipe.yaml", "--examples", "1", "--cache", "kept")
    first = mistral_lora(*command, "--json", folder=recipe.parent)
    checks = [check["subject"] for check in json.loads(first.stdout)["checks"]]
    again = mistral_lora(*command, folder=recipe.parent)
    assert from_cache(again.stdout) == len(checks) - checks.count("dataset") + 1


_IMPORTED = """
import json, sys
from pytest_mistral_lora.cli import main
HEAVY = ("torch", "transformers", "mistral_common", "hypothesis", "numpy", "pydantic", "asyncio", "filelock", "jinja2")
"""
_OPENED = """
import json, os, sys
opened = set()
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path.startswith(os.getcwd() + os.sep) and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            opened.add(os.path.relpath(path))
sys.addaudithook(note)
read = set()
original = type(os.environ).__getitem__
def note_variable(self, name):
    read.add(name)
    return original(self, name)
type(os.environ).__getitem__ = note_variable
from pytest_mistral_lora.cli import main
code = main(["check", "recipe.yaml", "--examples", "1", "--no-cache"])
print(json.dumps([code, sorted(opened), sorted(read)]))
"""


def test_each_file_and_variable_that_a_check_reads_is_part_of_the_key(recipe: Path, mistral_lora: RunVerb) -> None:
    folder = recipe.parent
    done = run_forked([sys.executable, "-c", _OPENED], cwd=folder)
    code, opened, read = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stdout + done.stderr
    assert {"recipe.yaml", "rows.jsonl", "base/config.json"} <= set(opened)
    assert "MISTRAL_LORA_PROCESSES" in read
    of_terminals = {"COLUMNS", "LINES", "TERM", "COLORTERM", "NO_COLOR", "FORCE_COLOR", "CLICOLOR"}
    assert {name for name in read if kept_results._IGNORED.fullmatch(name)} <= of_terminals
    mistral_lora("check", "recipe.yaml", "--examples", "1", "--cache", "kept", folder=folder)
    declared: set[Any] = set()
    for entry in entries(folder / "kept"):
        declared |= {(folder / path).resolve() for path in json.loads(entry.read_text())["content"]["content"]}
    # Hypothesis keeps the constants of modules in its folder, and Python looks for the source of a template
    files_read = [folder / name for name in opened if not name.startswith((".hypothesis/", "<"))]
    assert [file for file in files_read if not declared & {file.resolve(), *file.resolve().parents}] == []


def test_inputs_are_declared_for_subjects_that_exist() -> None:
    assert set(INPUTS) <= set(SUBJECT_CHECKS)
