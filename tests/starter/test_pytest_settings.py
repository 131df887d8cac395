"""Our keys in files of other tools: pytest's own reading and a parser of each format are the judges."""

from __future__ import annotations

import configparser
import tomllib
from pathlib import Path

import pytest
import yaml

from pytest_mistral_lora.starter.settings import ignore_settings, pre_commit_settings, pytest_settings

VALUES = {"mistral_recipes": ["recipe.yaml"], "mistral_golden_dirs": ["tests/goldens"]}
HOOK = "- repo: local\n  hooks:\n    - id: mine\n      files: ^recipe\n"

FILES: dict[str, tuple[dict[str, str], str]] = {
    "no file": ({}, "pytest.ini"),
    "pytest.ini": ({"pytest.ini": "# ours\n[pytest]\naddopts = -q\n"}, "pytest.ini"),
    "an empty pytest.ini": ({"pytest.ini": ""}, "pytest.ini"),
    "pyproject.toml without a section": ({"pyproject.toml": "[project]\nname = 'x'  # x"}, "pyproject.toml"),
    "pyproject.toml": (
        {"pyproject.toml": "[tool.pytest.ini_options]  # ours\naddopts = '-q'\n[tool.x]\ny = 1\n"},
        "pyproject.toml",
    ),
    "pyproject.toml at its end": ({"pyproject.toml": "[ tool . pytest . ini_options ]"}, "pyproject.toml"),
    "an empty pyproject.toml": ({"pyproject.toml": ""}, "pyproject.toml"),
    "tox.ini, and a pyproject.toml that pytest passes over": (
        {"pyproject.toml": "[project]\nname = 'x'\n", "tox.ini": "[tox]\nx = {posargs:%}\n[pytest]\naddopts = -q\n"},
        "tox.ini",
    ),
    "setup.cfg": ({"setup.cfg": "[metadata]\nname = x\n[tool:pytest]\naddopts = -q\n"}, "setup.cfg"),
    "one key is there": (
        {"pyproject.toml": '[tool.pytest.ini_options]\nmistral_recipes = ["a.yaml", "./recipe.yaml"]\n'},
        "pyproject.toml",
    ),
}


def parsed(name: str, text: str) -> dict[str, dict[str, object]]:
    if name.endswith(".toml"):
        data = tomllib.loads(text)
        return {**data, "ours": data.get("tool", {}).get("pytest", {}).get("ini_options", {})}
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text)
    data = {section: dict(parser[section]) for section in parser.sections()}
    return {**data, "ours": data.get("pytest", data.get("tool:pytest", {}))}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "lora-out/\nmerged/\n"),
        ("", "lora-out/\nmerged/\n"),
        ("*.pyc\n/merged\n", "*.pyc\n/merged\nlora-out/\n"),
        ("a", "a\nlora-out/\nmerged/\n"),
        ("a\r\n", "a\r\nlora-out/\r\nmerged/\r\n"),
        ("merged/\nlora-out\n", "merged/\nlora-out\n"),
    ],
)
def test_patterns_are_added_to_those_that_git_ignores(before: str | None, after: str, tmp_path: Path) -> None:
    if before is not None:
        (tmp_path / ".gitignore").write_bytes(before.encode())
    made = ignore_settings(tmp_path, ["lora-out/", "merged/"])
    assert made.text == after
    (tmp_path / ".gitignore").write_bytes(b"\xff")
    assert ignore_settings(tmp_path, ["lora-out/"]).text is None


@pytest.mark.parametrize("case", FILES)
def test_a_default_is_added_unless_the_file_has_the_setting(case: str, tmp_path: Path) -> None:
    files, expected = FILES[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    made = pytest_settings(tmp_path, VALUES, {"testpaths": ["tests"], "addopts": ["-v"]})
    assert made.text is not None
    ours, old = parsed(expected, made.text)["ours"], parsed(expected, files.get(expected, ""))["ours"]
    assert set(ours) == {"testpaths", "addopts", *VALUES, *old}
    assert {key: ours[key] for key in old} == old


@pytest.mark.parametrize("case", FILES)
def test_a_word_is_added_once_and_a_later_one_stays(case: str, tmp_path: Path, pytester: pytest.Pytester) -> None:
    files, expected = FILES[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    made = pytest_settings(tmp_path, VALUES, {"mistral_rules": "0.1"})
    assert made.text is not None
    (tmp_path / expected).write_text(made.text)
    assert pytester.parseconfig(tmp_path).getini("mistral_rules") == "0.1"
    assert pytest_settings(tmp_path, VALUES, {"mistral_rules": "0.2"}).text == made.text


@pytest.mark.parametrize("case", FILES)
def test_keys_are_added_to_the_file_that_pytest_reads(case: str, tmp_path: Path, pytester: pytest.Pytester) -> None:
    files, expected = FILES[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    made = pytest_settings(tmp_path, VALUES)
    assert (made.name, made.text is None) == (expected, False)
    assert made.text is not None
    before = files.get(expected, "")
    assert all(line in made.text.splitlines() for line in before.splitlines()), "every line stays"
    ours, old = parsed(expected, made.text)["ours"], parsed(expected, before)["ours"]
    assert {key: ours[key] for key in old} == old
    assert set(ours) - set(old) == VALUES.keys() - set(old)
    # pytest itself finds the keys there, and no other file before it
    (tmp_path / expected).write_text(made.text)
    config = pytester.parseconfig(tmp_path)
    assert config.inipath == tmp_path / expected
    assert tmp_path / "recipe.yaml" in config.getini("mistral_recipes")
    assert config.getini("mistral_golden_dirs") == [tmp_path / "tests" / "goldens"]
    # and once more, nothing changes
    assert pytest_settings(tmp_path, VALUES).text == made.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pyproject.toml", "[tool.pytest.ini_options]\nmistral_recipes = ['mine.yaml']\n"),
        ("pyproject.toml", "tool.pytest.ini_options.addopts = '-q'\n"),
        ("pyproject.toml", "[tool.pytest.ini_options\n"),
        ("pyproject.toml", f"a = {'[' * 3000}{']' * 3000}\n"),
        ("pytest.ini", "[pytest]\nmistral_recipes = mine.yaml\n"),
    ],
    ids=[
        "a list of other recipes",
        "dotted keys",
        "a file that cannot be read",
        "a file of many levels",
        "other recipes in an ini file",
    ],
)
def test_a_file_that_cannot_be_extended_stays_and_has_its_lines_for_the_user(
    name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    made = pytest_settings(tmp_path, VALUES)
    assert (made.name, made.text) == (name, None)
    assert "recipe.yaml" in made.lines


@pytest.mark.parametrize(
    "text",
    [
        "# ours\nrepos:\n- repo: https://example.com/x\n  rev: v1  # a tag\n  hooks: [{id: x}]\n",
        "ci: {skip: [x]}\nrepos:\n    # first\n    - repo: local\n      hooks: []\nexclude: y\n",
    ],
)
def test_a_hook_is_added_to_those_of_pre_commit(text: str, tmp_path: Path) -> None:
    (tmp_path / ".pre-commit-config.yaml").write_text(text)
    made = pre_commit_settings(tmp_path, HOOK)
    assert made.text is not None
    before, after = yaml.safe_load(text), yaml.safe_load(made.text)
    assert after["repos"] == [*yaml.safe_load(HOOK), *before["repos"]]
    assert {**after, "repos": 0} == {**before, "repos": 0}
    assert all(line in made.text.splitlines() for line in text.splitlines())
    (tmp_path / ".pre-commit-config.yaml").write_text(made.text)
    assert pre_commit_settings(tmp_path, HOOK).text == made.text


def test_the_line_ends_of_windows_stay(tmp_path: Path) -> None:
    texts = {
        "pytest.ini": "# ours\r\n[pytest]\r\naddopts = -q\r\n",
        ".pre-commit-config.yaml": "repos:\r\n- repo: local\r\n  hooks: []\r\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    for name, made in (
        ("pytest.ini", pytest_settings(tmp_path, VALUES)),
        (".pre-commit-config.yaml", pre_commit_settings(tmp_path, HOOK)),
    ):
        assert made.text is not None
        assert made.text.count("\r\n") == made.text.count("\n") > texts[name].count("\n")
        assert all(line in made.text for line in texts[name].splitlines(keepends=True))
        # a file of mixed line ends is not ours to mend
        (tmp_path / name).write_bytes(texts[name].encode().replace(b"\r\n", b"\n", 1))
    assert pytest_settings(tmp_path, VALUES).text is None
    assert pre_commit_settings(tmp_path, HOOK).text is None


UNFIT = [
    *("repos: []\n", "repos: [{repo: local, hooks: []}]\n", "- a\n", "repos: [\n", ""),
    "repos:\n- repo: a\nrepos:\n- repo: b\n",
    "x: &a\n  repos:\n  - repo: local\n<<: *a\n",
    "a: &x\n- repo: a\nrepos: *x\n",
    "repos: &a\n- *a\n",
    "v: 2026-13-45\nrepos:\n- repo: a\n",
    f"repos:\n- {'[' * 500}{']' * 500}\n",
]


@pytest.mark.parametrize("text", UNFIT, ids=[repr(text)[:30] for text in UNFIT])
def test_hooks_that_cannot_be_extended_stay(text: str, tmp_path: Path) -> None:
    (tmp_path / ".pre-commit-config.yaml").write_text(text)
    made = pre_commit_settings(tmp_path, HOOK)
    assert (made.text, made.lines) == (None, HOOK)


@pytest.mark.parametrize("files", ["''", "'it''s'", '"a\\\\b"  # a comment', "^(a|b)"])
def test_a_hook_of_an_earlier_start_gets_the_new_files(files: str, tmp_path: Path) -> None:
    before = f"repos:\n- repo: local\n  hooks:\n    - id: mine\n      files: {files}\n- repo: meta\n  hooks: []\n"
    (tmp_path / ".pre-commit-config.yaml").write_text(before)
    hook = HOOK.replace("^recipe", "'^(recipe|it''s: \\# new)'")
    text = pre_commit_settings(tmp_path, hook).text
    assert text is not None
    assert yaml.safe_load(text)["repos"] == [*yaml.safe_load(hook), {"repo": "meta", "hooks": []}]
    assert text.count("# a comment") == before.count("# a comment")


def test_a_hook_of_an_earlier_start_keeps_the_version_of_its_rules(tmp_path: Path) -> None:
    hook = HOOK.replace("- id: mine\n", "- id: mine\n      entry: x check recipe.yaml --rules 0.2\n")
    for written, kept in (("--rules 0.1", "--rules 0.1"), ("--other", None)):
        before = f"repos:\n{hook}".replace("--rules 0.2", written).replace("^recipe", "^old")
        (tmp_path / ".pre-commit-config.yaml").write_text(before)
        text = pre_commit_settings(tmp_path, hook).text
        assert text is not None
        ours, *rest = yaml.safe_load(text)["repos"]
        [made] = ours["hooks"]
        assert made["files"] == "^recipe"
        # an entry that is not ours stays beside it
        assert (made["entry"].endswith(kept or "--rules 0.2"), len(rest)) == (True, 0 if kept else 1)
