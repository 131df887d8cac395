"""Checks that passed are not run again if nothing that they read has changed, and are run again if anything has."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from forked import run_forked

from pytest_mistral_lora.cli import check as verb
from pytest_mistral_lora.conformance import kept_results
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.collection import SUBJECT_CHECKS
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.kept_results import _SETTLED, _SUBJECTS, KeptResults
from pytest_mistral_lora.judging import plan_check
from pytest_mistral_lora.starter import write_plan
from pytest_mistral_lora.starter.plan import plan_start

RunVerb = Callable[..., subprocess.CompletedProcess[str]]

KEPT_FOLDER = verb._kept_folder
"""The real one: the tests have another, so that none of them finds the results of an earlier one."""

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SOUND = json.dumps({"messages": TALK}) + "\n"
OTHER = SOUND.replace("Hi", "Who is there?").replace("Hello", "A friend")
RECIPE = ("check", "recipe.yaml", "--examples", "1")
ALL, OF_ROWS = {*_SUBJECTS}, {"recipe", "dataset"}


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a recipe, its schema, rows and base: a test may change each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kept_results, "_SETTLED", 0)
    # the states of all libraries take longer than the rest
    monkeypatch.setattr(kept_results, "_LIBRARIES", ("jinja2",))
    monkeypatch.setattr(verb, "_kept_folder", lambda: tmp_path / "kept")
    shutil.copytree(tiny_base, "base", copy_function=shutil.copy)
    Path("rows.jsonl").write_text(SOUND)
    Path("more").mkdir()
    Path("more", "rows.jsonl").write_text(OTHER)
    write_plan(plan_start(Path(), [Path("rows.jsonl")], "base", ()))
    text = Path("recipe.yaml").read_text().replace("- rows.jsonl", "- rows.jsonl\n    - path: more")
    Path("recipe.yaml").write_text(re.sub(r"  checks: .*", "  checks: [{json_schema: schema.json}]", text))
    Path("schema.json").write_text("{}")
    return tmp_path


def judged(path: str = "recipe.yaml", tokenizer: str | None = None, result: Any = None, **options: Any) -> set[str]:
    """Return the subjects of a path that are judged, each by a check with this result; their results are kept."""
    of_run = {
        "examples": 1,
        "seed": None,
        "device": "cpu",
        "skip_training": True,
        "golden_folders": (),
        "update": False,
    }
    settings = Settings(**{**of_run, "shared_folder": None, **options})
    no_options = dict.fromkeys(("base", "oracle", "train"))
    found, kept = set(), KeptResults(Path("kept").absolute())
    named = None if tokenizer is None else Path(tokenizer)
    plan = plan_check([Path(path).absolute()], tokenizer=named, kind="", **no_options, option="--{}".format)
    for target in plan.targets:
        subjects = _SUBJECTS if path == "recipe.yaml" else ("dataset",)
        for subject in subjects:
            check = Check(target, "dataset", subject, Result)
            for one in kept.checks_of(subject, target, settings, lambda made=check: [made]):
                if not one.is_kept:
                    found.add(subject)
                    kept.take(one, result or Result())
    return found


def append(path: str, text: str = " ") -> None:
    with Path(path).open("a") as file:
        file.write(text)


def replace_text(path: str, old: str, new: str) -> None:
    """Change a file and keep its size and its time."""
    before = Path(path).stat()
    Path(path).write_text(Path(path).read_text().replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def lead_elsewhere(path: str) -> None:
    elsewhere = Path(f"other-{Path(path).name}").absolute()
    shutil.move(path, elsewhere)
    Path(path).symlink_to(elsewhere)


def take_other_base(recipe: str) -> None:
    shutil.copytree("base", "other")
    Path(recipe).write_text(Path(recipe).read_text().replace("path: base", "path: other"))


def put_file_in_place_of_output() -> None:
    Path("lora-out").rmdir()
    Path("lora-out").touch()


CHANGES: dict[str, tuple[Callable[[], object], set[str]]] = {
    "a row": (lambda: append("rows.jsonl", OTHER), OF_ROWS),
    "a row at the same size and time": (lambda: replace_text("rows.jsonl", "Hello", "Hullo"), OF_ROWS),
    "a row in a folder": (lambda: append("more/rows.jsonl", SOUND), OF_ROWS),
    "a file in a folder": (lambda: Path("more", "new.jsonl").write_text(SOUND), OF_ROWS),
    "rows are gone": (lambda: Path("more", "rows.jsonl").unlink(), OF_ROWS),
    "nothing": (lambda: Path("unrelated").touch(), set()),
    "the schema": (lambda: Path("schema.json").write_text('{"type": "object"}'), OF_ROWS),
    "the output": (lambda: Path("lora-out").mkdir(), OF_ROWS),
    "a file in place of the output": (put_file_in_place_of_output, OF_ROWS),
    "the recipe": (lambda: append("recipe.yaml", "\n# mine\n"), ALL),
    "a file of the base": (lambda: append("base/config.json"), ALL),
    "a new file of the base": (lambda: Path("base/chat_template.jinja").write_text("{{ messages }}"), ALL),
    "a link to a file": (lambda: lead_elsewhere("base/config.json"), ALL),
    "a file of the base is gone": (lambda: Path("base/config.json").unlink(), ALL),
    "a link to a folder": (lambda: lead_elsewhere("base"), ALL),
}
"""What is changed, one after the other, and the subjects that are then judged again."""


def test_what_depends_on_a_change_is_judged_again(folder: Path) -> None:
    assert (judged(), judged()) == (ALL, set())
    for name, (change, changed) in CHANGES.items():
        change()
        assert judged() == changed, name


@pytest.mark.parametrize(
    ("path", "tokenizer", "change"),
    [
        ("rows.jsonl", "base", lambda: append("rows.jsonl", OTHER)),
        ("rows.jsonl", "base", lambda: append("base/config.json")),
        ("rows.jsonl", "base/tokenizer.model.v3", lambda: append("rows.jsonl", OTHER)),
        ("rows.jsonl", "recipe.yaml", lambda: take_other_base("recipe.yaml")),
        ("rows.jsonl", "recipe.yaml", lambda: append("base/config.json")),
        ("more", "spm-v3", lambda: append("more/rows.jsonl", SOUND)),
    ],
)
def test_rows_depend_on_their_tokenizer(path: str, tokenizer: str, change: Callable[[], None], folder: Path) -> None:
    assert (judged(path, tokenizer), judged(path, tokenizer)) == ({"dataset"}, set())
    change()
    assert judged(path, tokenizer) == {"dataset"}


def test_another_variable_or_option_is_judged_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (judged(), judged()) == (ALL, set())
    for name in ("USE_TORCH", "HF_HOME", "CUDA_VISIBLE_DEVICES", "LANG", "MISTRAL_LORA_PROCESSES"):
        monkeypatch.setenv(name, "1")
        assert judged() == ALL, name
    assert judged(examples=3) == ALL
    assert (judged(), judged()) == (ALL, set())
    # of the window, and of what calls
    for ignored in ("COLUMNS", "OLDPWD", "SSH_CONNECTION", "TERM_SESSION_ID", "TMUX_PANE", "_", "PRE_COMMIT"):
        monkeypatch.setenv(ignored, "of the window")
    assert judged() == set()


def test_another_library_or_date_is_judged_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = folder / "site"
    library = shutil.copytree(
        Path(jinja2.__file__).parent, site / "copied", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(kept_results, "_LIBRARIES", ("copied", *kept_results._LIBRARIES))
    assert (judged(), judged()) == (ALL, set())
    append(str(library / "filters.py"), "\n")
    assert (judged(), judged()) == (ALL, set())
    (site / "other-1.0.dist-info").mkdir()
    assert (judged(), judged()) == (ALL, set())
    (site / "other-1.0.dist-info").rename(site / "other-1.1.dist-info")
    assert (judged(), judged()) == (ALL, set())
    # what Python compiles says nothing new
    (library / "__pycache__").mkdir()
    (library / "__pycache__" / "filters.pyc").touch()
    assert judged() == set()

    class Tomorrow(kept_results.date):
        """A day on which a template writes another date."""

        @classmethod
        def today(cls) -> Tomorrow:
            return cls(2999, 1, 1)

    monkeypatch.setattr(kept_results, "date", Tomorrow)
    assert judged() == ALL


def test_a_large_file_is_compared_by_its_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_results, "_LARGE", 10)
    assert (judged(), judged()) == (ALL, set())
    replace_text("rows.jsonl", "Hello", "Hullo")
    assert (judged(), judged()) == (OF_ROWS, set())
    shutil.copy2("rows.jsonl", "copy")
    Path("copy").replace("rows.jsonl")
    assert judged() == OF_ROWS


def test_what_changes_while_checks_run_or_shortly_before_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptResults.take

    def take(self: KeptResults, check: Check, result: Result) -> None:
        if check.case == "dataset":
            replace_text("rows.jsonl", "Hello", "Hullo")
        kept(self, check, result)

    with monkeypatch.context() as patch:
        patch.setattr(KeptResults, "take", take)
        assert judged() == ALL
    # the same content again: the checks of rows may have seen the other one
    replace_text("rows.jsonl", "Hullo", "Hello")
    assert judged() == {"dataset"}
    append("rows.jsonl", OTHER)
    monkeypatch.setattr(kept_results, "_SETTLED", 60)
    assert (judged(), judged()) == (OF_ROWS, OF_ROWS)


@pytest.mark.parametrize(
    ("old", "new", "subjects"),
    [
        ("- path: more", "- path: axolotl.yaml", OF_ROWS),
        ("seed: 0", "seed: 0\n  report_to: [tensorboard]", OF_ROWS),
    ],
)
def test_what_may_read_other_files_is_judged_each_time(old: str, new: str, subjects: set[str], folder: Path) -> None:
    Path("axolotl.yaml").write_text(
        "base_model: base\nchat_template: tokenizer_default\n"
        "datasets:\n  - path: rows.jsonl\n    type: chat_template\n    field_messages: messages\n"
    )
    text = Path("recipe.yaml").read_text()
    assert old in text
    Path("recipe.yaml").write_text(text.replace(old, new))
    assert (judged(), judged()) == (ALL, subjects)


def test_a_folder_with_a_link_to_a_folder_is_judged_each_time(folder: Path) -> None:
    Path("base", "inner").symlink_to(folder / "more")
    assert (judged(), judged()) == (ALL, ALL)


@pytest.mark.parametrize(
    ("result", "is_kept"),
    [
        (Result((Finding("ML601", "a"),)), False),
        (Result((Finding("ML644", "a", severity="error"),)), False),
        (Result((Finding("ML644", "a"),), facts=(("rows", 1),)), True),
        (Result(not_checked="recipe.yaml::dataset::recipe failed (ML208)"), False),
        (Result(not_checked="needs 30 GiB of memory"), False),
        (Result(not_checked="the template ran for more than 60 seconds"), False),
        (Result(not_checked="the check ended with ValueError: a"), False),
        (Result(not_checked="v3 cannot encode this case"), True),
    ],
)
def test_errors_and_what_the_machine_stopped_are_judged_each_time(result: Result, is_kept: bool, folder: Path) -> None:
    assert (judged(result=result), judged()) == (ALL, set() if is_kept else ALL)


def test_a_damaged_entry_or_one_of_another_target_is_not_believed(folder: Path) -> None:
    assert (judged("rows.jsonl", "base"), judged("more", "base")) == ({"dataset"}, {"dataset"})
    one, other = sorted(Path("kept").iterdir())
    text = one.read_text()
    for damaged in ("", text[:100], "[]", "{}", text.replace('"findings": []', '"findings": [1]'), other.read_text()):
        assert damaged != text
        one.write_text(damaged)
        assert len(judged("rows.jsonl", "base") | judged("more", "base")) == 1
        assert judged("rows.jsonl", "base") | judged("more", "base") == set()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="without owners and modes")
def test_a_folder_that_others_can_write_is_not_trusted(folder: Path, mistral_lora: RunVerb) -> None:
    assert (judged(), judged()) == (ALL, set())
    Path("kept").chmod(0o777)
    assert judged() == ALL
    done = mistral_lora("check", "rows.jsonl", "--tokenizer", "spm-v3", folder=folder)
    assert f"other users can write {folder / 'kept'} (mode 777)" in done.stdout


def test_no_subject_that_reads_weights_is_kept() -> None:
    assert set(SUBJECT_CHECKS) >= ALL
    assert ALL.isdisjoint(
        {"adapter", "merged", "manifest", "transcript", "train", "gguf", "server", "runner", "encoded"}
    )


_RUN = """
import json, os, sys
opened, read = set(), set()
def note(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[2] if event == "open" else 0
        if path.startswith(os.getcwd() + os.sep) and not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
            opened.add(os.path.relpath(path))
sys.addaudithook(note)
original = type(os.environ).__getitem__
def note_variable(self, name):
    read.add(name)
    return original(self, name)
type(os.environ).__getitem__ = note_variable
from pytest_mistral_lora.cli import main
code = main(json.loads(sys.argv[1]))
heavy = ("torch", "transformers", "mistral_common", "hypothesis", "numpy", "pydantic", "asyncio", "filelock", "jinja2")
print(json.dumps([code, sorted(opened), sorted(read), [name for name in heavy if name in sys.modules]]))
"""


def run(*words: str) -> tuple[str, int, set[str], set[str], list[str]]:
    """Run the program in a process of its own; return also the files and variables that it reads."""
    done = run_forked([sys.executable, "-c", _RUN, json.dumps(words)], cwd=Path.cwd())
    code, opened, read, heavy = json.loads(done.stdout.splitlines()[-1])
    return done.stdout, code, {*opened}, {*read}, heavy


@pytest.mark.parametrize(
    "words",
    [
        RECIPE,
        ("check", "rows.jsonl", "--tokenizer", "base"),
        ("check", "rows.jsonl", "--tokenizer", "base/tokenizer.model.v3"),
        ("check", "rows.jsonl", "--tokenizer", "recipe.yaml"),
        ("check", "base", "--examples", "1"),
        ("check", "alpaca.json", "--tokenizer", "base"),
        ("check", "images.jsonl", "--tokenizer", "base"),
    ],
    ids=" ".join,
)
def test_each_file_and_variable_that_a_check_reads_is_part_of_the_key(
    words: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("alpaca.json").write_text(json.dumps([{"instruction": "Hi", "input": "", "output": "Hello"}]))
    picture = {"type": "image_url", "image_url": {"url": (folder / "picture.png").as_uri()}}
    row = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, picture]}, TALK[1]]
    Path("images.jsonl").write_text(json.dumps({"messages": row}) + "\n")
    Path("picture.png").write_bytes(b"no picture")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(folder / "cache"))
    out, code, opened, read, _ = run(*words, "--no-cache")
    keys: set[Path] = set()
    for subject, target in targets_of(words):
        keys |= {path.resolve() for path in kept_results._paths(subject, target)}
    # a recipe that names the tokenizer is read for the target, whose base and oracle are part of the key
    of_target = (".hypothesis/", "<", *(["recipe.yaml"] if words[3] == "recipe.yaml" else []))
    files = [folder / name for name in opened if not name.startswith(of_target)]
    assert [file for file in files if not keys & {file, *file.parents}] == [], out
    assert (folder / words[1] in files) or code != 0
    of_terminals = {"COLUMNS", "LINES", "TERM", "PWD"}
    assert {name for name in read if kept_results._IGNORED.fullmatch(name)} <= of_terminals


def targets_of(words: tuple[str, ...]) -> list[tuple[str, Any]]:
    no_options = dict.fromkeys(("base", "oracle", "train"))
    tokenizer = Path(words[3]) if words[2] == "--tokenizer" else None
    plan = plan_check([Path(words[1]).absolute()], tokenizer=tokenizer, kind="", **no_options, option="--{}".format)
    subjects = ("dataset",) if tokenizer else _SUBJECTS if words[1] == "recipe.yaml" else ("tokenizer", "mask")
    return [(subject, target) for target in plan.targets for subject in subjects]


def test_a_second_run_says_what_the_first_one_said_and_loads_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(folder / "cache"))
    time.sleep(_SETTLED)  # a run that follows the last change too closely keeps nothing
    out = [run(*RECIPE, "-v")[0] for _ in range(2)]
    lines = [[line for line in text.splitlines()[:-1] if "from the cache" not in line] for text in out]
    assert lines[0] == lines[1]
    found = re.search(r"^(\d+) checks from the cache", out[1], flags=re.MULTILINE)
    assert found is not None
    assert int(found[1]) > 100
    # a hook waits for what the program imports, here in a new process
    words = [sys.executable, "-c", _RUN, json.dumps(RECIPE)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    assert json.loads(done.stdout.splitlines()[-1])[3] == [], done.stdout
    append("rows.jsonl", '{"messages": [{"role": "bot", "content": "Hi"}]}\n')
    for _ in range(2):
        text, code, *_ = run(*RECIPE)
        assert (code, "ML601" in text) == (1, True)


def test_ci_and_no_cache_keep_nothing(folder: Path, mistral_lora: RunVerb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(folder / "cache"))
    monkeypatch.setattr(verb, "_kept_folder", KEPT_FOLDER)
    monkeypatch.delenv("CI", raising=False)
    words = ("check", "rows.jsonl", "--tokenizer", "spm-v3")
    mistral_lora(*words, "--no-cache", folder=folder)
    assert not (folder / "cache" / "results").exists()
    monkeypatch.setenv("CI", "true")
    assert KEPT_FOLDER() is None
    monkeypatch.delenv("CI")
    mistral_lora(*words, folder=folder)
    assert "12 checks from the cache" in mistral_lora(*words, folder=folder).stdout
    assert "from the cache" not in mistral_lora(*words, "--no-cache", folder=folder).stdout
