"""Hostile names of bases and data: in each file that `init` writes they are a name and nothing more, or are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from sampling import sampled_case

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.starter import StartPlan
from pytest_mistral_lora.starter.names import require_plain, yaml_text
from pytest_mistral_lora.starter.plan import GITLAB, RECIPE, WORKFLOW, plan_start
from pytest_mistral_lora.training.recipe import load_recipe, parse_recipe, pin_recipe

HOOKS = ".pre-commit-config.yaml"
ROW = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
FOREIGN = json.dumps([{"instruction": "Add", "input": "1 2", "output": "3"}])

NAMES = [
    *("a b", " a ", "- touch PWNED", "x: y", "a #c", "#c", "{a: b}", "[b", "'q", '"d', 'it\'s "x"', "a\\nb", "a,b"),
    *("$(touch PWNED)", "`touch PWNED`", "; touch PWNED", "&& touch PWNED", "$HOME", "%s", "--force", "-x", "{{ a }}"),
    *("${{ secrets.HF_TOKEN }}", "~", "~root", "~nobody-here", "!!python", "&a", "*b", "? x", "@a"),
    *("null", "yes", "1e3", "0x10", "2026-01-01", "<<", "§recipe", "| x", "> x", "é東京", "🙂", "a+b(c)|d", "x" * 200),
]
REFUSED = [
    *(
        "m\n- touch PWNED\n#",
        "a\tb",
        "a\rb",
        "a\x00b",
        "a\x85b",
        "a\u2028b",
        "a\u2029b",
        "a\x1b[31m",
        "a\x7fb",
        "a\x9bb",
    ),
    *("a\u202eb", "a\u2066b", os.fsdecode(b"a\xffb")),
]


def shown(name: str) -> str:
    return ascii(name)[:40]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(folder: Path, base: Path, name: str, *, is_folder: bool = False, foreign: bool = False) -> StartPlan:
    """Return the plan for a base and data of a name."""
    for part in ("models", "data"):
        (folder / part).mkdir()
    (folder / "models" / name).symlink_to(base)
    data = folder / "data" / name
    if is_folder:
        data.mkdir()
    (data / "rows.jsonl" if is_folder else data).write_text(FOREIGN if foreign else f"{ROW}\n")
    # as a shell gives them: relative, and below a folder, so that no name is an option
    return plan_start(Path(), [data.relative_to(folder)], f"models/{name}")


def texts_of(plan: StartPlan) -> dict[str, str]:
    return {file.name: file.text for file in plan.files}


OPTIONS = {"rows": {}, "a folder": {"is_folder": True}, "another format": {"foreign": True}}


@pytest.fixture(scope="module")
def plain_texts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Return the files for a plain name and a kind of data."""

    @cache
    def texts(kind: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("plain")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return texts_of(named(folder, base, "plain", **OPTIONS[kind]))

    return texts


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*place, key))
    else:
        yield place, value


def changed(one: str, other: str) -> dict[tuple[Any, ...], Any]:
    """Return the values of a YAML text that are others than in another one, which has the same keys."""
    before, after = dict(leaves(yaml.safe_load(one))), dict(leaves(yaml.safe_load(other)))
    assert before.keys() == after.keys()
    return {place: value for place, value in after.items() if before[place] != value}


# what each file and shell is fooled by; the sweeps take every name
FOOLING = ("x: y", '"d', "$(touch PWNED)", "--force", "${{ secrets.HF_TOKEN }}", "~root", "{{ a }}", "é東京")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        sampled_case(kind, name, name=f"{kind}-{shown(name)}", is_kept=name in names)
        for kind, names in {"rows": FOOLING, "a folder": FOOLING[:3], "another format": FOOLING[:3]}.items()
        for name in NAMES
    ],
)
def test_a_hostile_name_is_a_name_in_each_file(
    name: str, kind: str, base: Path, repository: Path, plain_texts: Callable[[str], dict[str, str]]
) -> None:
    plain = plain_texts(kind)
    hostile = texts_of(named(repository, base, name, **OPTIONS[kind]))
    assert hostile.keys() == plain.keys()
    # no job has a name in it, be it a value, a command or a comment
    differing = {file for file in plain if hostile[file] != plain[file]}
    assert differing == {RECIPE, HOOKS}
    recipe = changed(plain[RECIPE], hostile[RECIPE])
    assert sorted(recipe.values()) == sorted([f"models/{name}", f"data/{name}"])
    [(place, files)] = changed(plain[HOOKS], hostile[HOOKS]).items()
    assert place == ("repos", 0, "hooks", 0, "files")
    assert [bool(re.search(files, path)) for path in (f"data/{name}", f"x/data/{name}")] == [True, False]
    # each comment is the same text
    comments = [[line.partition("  # ")[2] for line in text.splitlines()] for text in (hostile[RECIPE], plain[RECIPE])]
    assert [comment for comment in comments[0] if comment not in name] == [text for text in comments[1] if text]
    (repository / RECIPE).write_text(hostile[RECIPE], encoding="utf-8")
    read = load_recipe(repository / RECIPE)
    assert (read.base.path, read.data.paths) == (repository / "models" / name, (repository / "data" / name,))
    if kind == "a folder":
        return  # a recipe that is there names its files
    # and beside this recipe, the files are the same once more
    assert {**hostile, **texts_of(plan_start(Path(), [], None))} == hostile


def exit_code(words: list[str]) -> object:
    """Return the exit code of a command; argparse refuses a null character itself."""
    try:
        return main(words)
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize("name", REFUSED, ids=shown)
@pytest.mark.parametrize("option", ["base", "rows", "repository", "recipe", "data of a recipe"])
def test_a_name_of_several_lines_is_refused_and_nothing_is_written(
    name: str, option: str, base: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "base").symlink_to(base)
    (repository / "rows.jsonl").write_text(f"{ROW}\n")
    if "\0" not in name:
        (repository / "models").mkdir()
        (repository / "models" / name).symlink_to(base)
        (repository / name).write_text(f"{ROW}\n")
    words = ["rows.jsonl", "--base", "base"]
    if option == "base":
        words[2] = f"models/{name}"
    elif option == "rows":
        words[0] = name
    elif option == "repository":
        words[2] = f"owner/name@{name}"
    else:
        part = {"path": "base", "weights_sha256": "0" * 64, "name": name if option == "recipe" else "base"}
        data = {"base": part, "data": {"train": ["rows.jsonl" if option == "recipe" else name]}, "output": "out"}
        (repository / RECIPE).write_text(yaml.safe_dump({**data, "training": {"steps": 1}}))
        words = []
    before = sorted(repository.rglob("*"))
    assert exit_code(["init", *words]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(repository.rglob("*")) == before


def test_each_hostile_name_a_letter_of_two_directions_and_a_joined_emoji_are_plain() -> None:
    for name in (*NAMES, "שלום", "مرحبا", "👩‍💻", "a\u00a0b", "می‌خواهم"):
        require_plain(name, Place.of("--base"))
        assert yaml.safe_load(yaml_text(name)) == name
    with pytest.raises(InputError, match=r"the name 'a\\nb' has the character U\+000A"):
        require_plain("a\nb", Place.of("--base"))


def test_the_commands_of_the_jobs_run_nothing_but_their_programs(base: Path, repository: Path) -> None:
    texts = texts_of(named(repository, base, "$(touch PWNED)"))
    programs = repository / "programs"
    programs.mkdir()
    for program in ("pip", "pytest", "mistral-lora", "cp", "cat"):
        (programs / program).write_text(f"#!/bin/sh\nprintf '%s' {program}\nprintf '[%s]' \"$@\"\necho\n")
        (programs / program).chmod(0o755)
    (programs / "env").symlink_to(str(shutil.which("env")))
    workflow, jobs = yaml.safe_load(texts[WORKFLOW]), yaml.safe_load(texts[GITLAB])
    scripts = {
        "github": [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step],
        "gitlab": [line for name, job in jobs.items() if name != "include" for line in job.get("script", ())],
    }
    for service, script in scripts.items():
        variables = workflow["env"] if service == "github" else jobs[".mistral-lora"]["variables"]
        done = subprocess.run(
            ["/bin/sh", "-e", "-c", "\n".join(script)],
            env={
                "PATH": str(programs),
                "PACKAGE": variables["PACKAGE"],
                "TRAIN_PACKAGE": "$(touch PWNED) * x",
                "GITHUB_STEP_SUMMARY": "summary.md",
            },
            cwd=repository,
            capture_output=True,
            text=True,
            check=True,
        )
        lines = done.stdout.splitlines()
        shown = [line for line in "\n".join(script).splitlines() if line and ">" not in line]
        assert len(lines) == len(shown)
        assert lines[0] == f"pip[install][{variables['PACKAGE']}]"
        assert "pip[install][$(touch PWNED) * x]" in lines
        assert done.stderr == ""
    assert not (repository / "PWNED").exists()


@pytest.mark.parametrize("name", ["~", "~root", "~/x", "~nobody-here"])
def test_a_folder_of_a_tilde_is_not_the_home_folder(name: str, base: Path, repository: Path) -> None:
    (repository / name).mkdir(parents=True)
    (repository / name / "rows.jsonl").write_text(f"{ROW}\n")
    (repository / name / "base").symlink_to(base)
    # as `mistral-lora init '~/rows.jsonl'`: the shell expands nothing within quotes
    plan = plan_start(Path(), [Path(name, "rows.jsonl")], f"{name}/base")
    (repository / RECIPE).write_text(texts_of(plan)[RECIPE])
    recipe = load_recipe(repository / RECIPE)
    expected = (repository / name / "base", (repository / name / "rows.jsonl",))
    assert (recipe.base.path, recipe.data.paths) == expected
    # from the recipe in a manifest, too
    again = parse_recipe(recipe.as_written(), folder=repository)
    assert (again.base.path, again.data.paths) == expected
    assert pin_recipe(repository / RECIPE).value == recipe.base.weights_sha256
    [hook] = yaml.safe_load(texts_of(plan)[HOOKS])["repos"][0]["hooks"]
    assert re.search(hook["files"], f"{name}/rows.jsonl")


def test_a_tilde_in_a_recipe_is_the_home_folder_once(
    base: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = repository / "~root" / "home"
    home.mkdir(parents=True)
    (home / "base").symlink_to(base)
    monkeypatch.setenv("HOME", str(home))
    text = "base: {path: ~/base}\ndata: {train: [~/rows.jsonl]}\ntraining: {steps: 1}\noutput: ~/out\n"
    (repository / RECIPE).write_text(text)
    pinned = pin_recipe(repository / RECIPE)
    recipe = load_recipe(repository / RECIPE)
    assert (recipe.base.path, recipe.base.weights_sha256) == (home / "base", pinned.value)
    assert (recipe.data.paths, recipe.output) == ((home / "rows.jsonl",), home / "out")
