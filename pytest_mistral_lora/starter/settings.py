"""Add our keys to files of other tools: pytest's configuration and pre-commit's, and change nothing else."""

from __future__ import annotations

import configparser
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from textwrap import indent
from typing import Any, TypeAlias

import yaml

from pytest_mistral_lora.chat.reading import opened
from pytest_mistral_lora.starter.names import yaml_text


@dataclass(frozen=True)
class ExtendedFile:
    """A file of another tool, with our lines.

    Attributes:
        name: Its name in the repository.
        text: Its new content; None if our lines could not be added.
        lines: Our lines, for adding them by hand.
        section: The place in the file where they belong.
    """

    name: str
    text: str | None
    lines: str
    section: str


PYTEST_FILES = ("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg")
"""The files in which pytest looks for its configuration, in its order."""
_SECTIONS = {"tox.ini": "pytest", "setup.cfg": "tool:pytest", "pytest.ini": "pytest", ".pytest.ini": "pytest"}
_TOML = {
    "pyproject.toml": ("tool.pytest.ini_options", "tool.pytest"),
    "pytest.toml": ("pytest",),
    ".pytest.toml": ("pytest",),
}


Value: TypeAlias = "list[str] | str"
"""The value of a setting: paths, or one word."""


def pytest_settings(
    folder: Path, values: Mapping[str, Value], defaults: Mapping[str, Value] | None = None
) -> ExtendedFile:
    """Return the file of a folder that pytest reads, with our settings.

    Args:
        folder: The repository.
        values: Values by the name of the setting.
        defaults: The same, for settings that stay as they are if the file has them.
    """
    defaults = defaults or {}
    texts = {name: _text(folder / name) for name in PYTEST_FILES if (folder / name).is_file()}
    for name, text in texts.items():
        sections = _TOML.get(name) or (_SECTIONS[name],)
        for section in sections:
            # pytest reads the files with its own name even if they are empty
            if text is not None and ("pytest." in name or _section(_parsed(name, text), name, section) is not None):
                present = _section(_parsed(name, text), name, section) or {}
                new = {key: paths for key, paths in defaults.items() if key not in present}
                return _with_line_ends(folder / name, _extended(name, text, section, {**values, **new}))
    values = {**values, **defaults}
    name = "pyproject.toml" if "pyproject.toml" in texts else "pytest.ini"
    section = _TOML[name][0] if name in _TOML else "pytest"
    before = texts.get(name)
    if before is None:
        return ExtendedFile(name, None if name in texts else _new_section(name, section, values), "", section)
    gap = "\n" if before.strip() else ""
    text = f"{before.rstrip()}\n{gap}{_new_section(name, section, values)}".lstrip("\n")
    return _with_line_ends(folder / name, _checked(name, before, text, section, values))


def _with_line_ends(path: Path, made: ExtendedFile) -> ExtendedFile:
    """Keep the line ends of Windows in an extended file; a file with mixed line ends stays unchanged."""
    before = path.read_bytes()
    if made.text is None or b"\r" not in before:
        return made
    is_windows = before.count(b"\r\n") == before.count(b"\r") == before.count(b"\n")
    return replace(made, text=made.text.replace("\n", "\r\n") if is_windows else None)


def _text(path: Path) -> str | None:
    try:
        with opened(path) as file, TextIOWrapper(file, encoding="utf-8") as text:
            return text.read()
    except (OSError, UnicodeError):
        return None


def _parsed(name: str, text: str) -> Any:
    """Return the content of a configuration file as plain data; None if it cannot be read."""
    if name in _TOML:
        try:
            return tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError):
            return None
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(text)
    except configparser.Error:
        return None
    return {section: dict(parser[section]) for section in parser.sections()}


def _section(data: Any, name: str, section: str) -> dict[str, Any] | None:
    for step in section.split(".") if name in _TOML else [section]:
        data = data.get(step) if isinstance(data, dict) else None
    # [tool.pytest] holds ini_options in older files
    is_parent = section == "tool.pytest" and isinstance(data, dict) and set(data) <= {"ini_options"}
    return data if isinstance(data, dict) and not is_parent else None


def _lines(name: str, values: Mapping[str, Value]) -> str:
    if name in _TOML:
        # JSON's quotes are also valid in TOML
        return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
    return "".join(
        f"{key} = {value}\n" if isinstance(value, str) else f"{key} =\n" + "".join(f"    {path}\n" for path in value)
        for key, value in values.items()
    )


def _new_section(name: str, section: str, values: Mapping[str, Value]) -> str:
    return f"[{section}]\n{_lines(name, values)}"


def _extended(name: str, text: str, section: str, values: Mapping[str, Value]) -> ExtendedFile:
    present = _section(_parsed(name, text), name, section) or {}
    new = {key: paths for key, paths in values.items() if not _names(present.get(key), paths)}
    if not new:
        return ExtendedFile(name, text, "", section)
    parts = [re.escape(part) for part in (section.split(".") if name in _TOML else [section])]
    dotted = r"\s*\.\s*".join(parts)
    header = re.search(rf"^[ \t]*\[\s*{dotted}\s*\].*(\n|\Z)", text, flags=re.MULTILINE)
    if header is None and not present and name in (*_SECTIONS, "pytest.toml", ".pytest.toml"):
        changed = f"{_new_section(name, section, new)}{text}"
    elif header is None or any(key in present for key in new):
        return ExtendedFile(name, None, _lines(name, new), section)
    else:
        end = header.end()
        gap = "" if text[:end].endswith("\n") else "\n"
        changed = f"{text[:end]}{gap}{_lines(name, new)}{text[end:]}"
    return _checked(name, text, changed, section, new)


def _names(present: Any, value: Value) -> bool:
    """Return whether an existing setting names these paths, or this word."""
    paths = [value] if isinstance(value, str) else value
    listed: list[Any] = []
    if isinstance(present, str):
        listed = present.split("\n")
    elif isinstance(present, list):
        listed = present
    return {Path(path.strip()) for path in map(str, listed)} >= set(map(Path, paths))


def _checked(name: str, before: str, text: str, section: str, new: Mapping[str, Value]) -> ExtendedFile:
    """Return the file with the new text only if a parser finds our settings in it and all other settings unchanged."""
    old, found = _parsed(name, before) or {}, _parsed(name, text)
    settings = None if found is None else _section(found, name, section)
    if settings is not None and all(_names(settings.get(key), paths) for key, paths in new.items()):
        for key in new:
            del settings[key]
        if _without_empty(found) == _without_empty(old):
            return ExtendedFile(name, text, _lines(name, new), section)
    return ExtendedFile(name, None, _lines(name, new), section)


def _without_empty(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    parts = {key: _without_empty(value) for key, value in data.items()}
    return {key: value for key, value in parts.items() if value != {}}


GIT_IGNORE = ".gitignore"
"""The file of patterns that Git leaves out."""


def ignore_settings(folder: Path, patterns: Sequence[str]) -> ExtendedFile:
    """Return the repository's `.gitignore` with our patterns behind its own; a pattern that it has is not repeated.

    Args:
        folder: The repository.
        patterns: Folders, such as `lora-out/`.
    """
    path = folder / GIT_IGNORE
    before = _text(path) if path.exists() else ""
    if before is None:
        return ExtendedFile(GIT_IGNORE, None, "".join(f"{pattern}\n" for pattern in patterns), "the file")
    present = {line.strip().strip("/") for line in before.splitlines()}
    lines = "".join(f"{pattern}\n" for pattern in patterns if pattern.strip("/") not in present)
    gap = "\n" if lines and before and not before.endswith("\n") else ""
    made = ExtendedFile(GIT_IGNORE, f"{before}{gap}{lines}", lines, "the file")
    return _with_line_ends(path, made) if path.exists() else made


PRE_COMMIT = ".pre-commit-config.yaml"
"""The configuration file of pre-commit."""


def pre_commit_settings(folder: Path, hook: str) -> ExtendedFile:
    """Return pre-commit's configuration with our hook as its first one.

    Args:
        folder: The repository.
        hook: Our entry of `repos`, as YAML that begins with `- `.
    """
    path = folder / PRE_COMMIT
    if not path.exists():
        return ExtendedFile(PRE_COMMIT, f"repos:\n{indent(hook, '  ')}", hook, "repos")
    before = _text(path)
    try:
        text = _with_hook(before or "", hook)
    # invalid YAML, an impossible date, a list that contains itself, or an entry merged from others
    except (yaml.YAMLError, ValueError, LookupError, RecursionError):
        text = None
    lines = "" if text is not None and text == before else hook
    return _with_line_ends(path, ExtendedFile(PRE_COMMIT, text, lines, "repos"))


def _with_hook(before: str, hook: str) -> str | None:
    """Return a configuration with our hook and no other change; None if that is not possible."""
    data = yaml.safe_load(before)
    repos = data.get("repos") if isinstance(data, dict) else None
    if not isinstance(repos, list) or not repos:
        return None
    [ours] = yaml.safe_load(hook)
    if ours in repos:
        return before
    [ours_now] = ours["hooks"]
    root: Any = yaml.compose(before, Loader=yaml.SafeLoader)
    nodes = [value for key, value in root.value if key.value == "repos"]
    # the hook of an earlier start gets the files of other data, and keeps the version of its rules
    earlier = [repo for repo in repos if repo == {**ours, "hooks": [{**ours_now, **_set_before(repo, ours_now)}]}]
    if earlier:
        entry = nodes[0].value[repos.index(earlier[0])]
        [files] = _values(_values(entry, "hooks")[0].value[0], "files")
        written = yaml_text(ours_now["files"])
        text = f"{before[: files.start_mark.index]}{written}{before[files.end_mark.index :]}"
        [kept] = earlier[0]["hooks"]
        after = {**ours, "hooks": [{**kept, "files": ours_now["files"]}]}
        expected = [after if repo is earlier[0] else repo for repo in repos]
    else:
        if len(nodes) != 1 or nodes[0].flow_style:
            return None
        column = nodes[0].start_mark.column
        start = nodes[0].start_mark.index - column
        text = f"{before[:start]}{indent(hook, ' ' * column)}{before[start:]}"
        expected = [ours, *repos]
    return text if yaml.safe_load(text) == {**data, "repos": expected} else None


def _values(mapping: Any, name: str) -> list[Any]:
    return [value for key, value in mapping.value if key.value == name]


def _set_before(repository: Any, ours: Mapping[str, str]) -> dict[str, str]:
    """Return what an earlier start can have written in another way: the files, and the version of the rules."""
    hooks = repository.get("hooks") if isinstance(repository, dict) else None
    first = hooks[0] if isinstance(hooks, list) and hooks and isinstance(hooks[0], dict) else {}
    found = {"files": str(first.get("files", ""))}
    command, option, _ = ours.get("entry", "").partition(" --rules ")
    if option and str(first.get("entry", "")).startswith(command + option):
        found["entry"] = first["entry"]
    return found
