"""Records the facts of recipes from checkouts of their repositories, into docs/recipes/."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_mistral_lora.records.files import write_json
from recipes_of_trainers.reading import Keys, keys_of
from recipes_of_trainers.sources import SOURCES, Source

FOLDER = Path(__file__).parents[2] / "docs" / "recipes"
_TEMPLATES = {
    "hiyouga/LLaMA-Factory": ("src/llamafactory/data/template.py", "register_template"),
    "modelscope/ms-swift": ("swift/template/templates/mistral.py", "Mistral3TemplateMeta"),
}


def record(repository: str, checkout: Path, date: str) -> Path:
    """Record the recipes of a checkout: its commit, and of each file the keys with their lines.

    Args:
        repository: Its owner and name, as in `SOURCES`.
        checkout: The folder of the repository, or its git directory.
        date: The day, as `2026-11-30`.

    Returns:
        The file that was written.
    """
    source = next(source for source in SOURCES if source.repository == repository)
    commit, committed = _git(checkout, "log", "-1", "--format=%H %cs").split()
    paths = _git(checkout, "ls-tree", "-r", "-z", "--name-only", "HEAD").split("\0")
    recipes: list[dict[str, Any]] = []
    for path in filter(source.is_recipe, paths):
        text = show(checkout, path)
        if source.reader == "slots":
            recipes += _templates_of(source, checkout, path, text)
        else:
            found = {name: key for name, key in keys_of(path, text).items() if re.search(source.keys, name)}
            recipes.append({"path": path, "keys": found})
    file = FOLDER / f"{source.name}.json"
    head = {"repository": repository, "commit": commit, "committed": committed, "recorded": date}
    file.parent.mkdir(exist_ok=True)
    write_json(file, {**head, "recipes": recipes})
    return file


def read() -> Iterator[tuple[Source, dict[str, Any]]]:
    """Yield each source with its recorded facts."""
    for source in SOURCES:
        file = FOLDER / f"{source.name}.json"
        if file.is_file():
            yield source, json.loads(file.read_text(encoding="utf-8"))


def show(checkout: Path, path: str) -> str:
    """Return the text of a file of a checkout, at its commit."""
    return _git(checkout, "show", f"HEAD:{path}")


def _git(checkout: Path, *words: str) -> str:
    ended = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, check=True)
    return ended.stdout.decode("utf-8")


def _templates_of(source: Source, checkout: Path, path: str, text: str) -> Iterator[dict[str, Any]]:
    """Yield each template that a trainer registers for Mistral's models, with the models and its slots."""
    place, call = _TEMPLATES[source.repository]
    slots = _slots(show(checkout, place), call, place)
    if source.repository == "modelscope/ms-swift":
        for other in ("swift/template/templates/llm.py", "swift/template/templates/llama.py"):
            slots = {**_slots(show(checkout, other), "TemplateMeta", other), **slots}
    for name, line, models in _groups(text):
        if models:
            keys: Keys = {"template": {"value": name, "line": line}, "models": {"value": models, "line": line}}
            yield {"path": path, "keys": {**keys, **slots.get(name, {})}}


def _groups(text: str) -> Iterator[tuple[str, int, list[str]]]:
    """Yield the name of each template that is registered for models of Mistral, its line, and the models."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "register_model_group":
            names = re.findall(r"'(?:\w[\w-]*)/([\w.-]*(?:stral|ixtral)[\w.-]*)'", ast.unparse(node))
            template = next((key.value for key in node.keywords if key.arg == "template"), None)
            if names and isinstance(template, ast.Constant) and "llava" not in str(template.value):
                yield str(template.value), template.lineno, sorted(set(names))
        elif called == "ModelMeta":
            yield from _meta_groups(node)


def _meta_groups(node: ast.Call) -> Iterator[tuple[str, int, list[str]]]:
    """Yield the templates of a `ModelMeta` of ms-swift: its own, and those of groups of its models."""
    default = next(key.value for key in node.keywords if key.arg == "template")
    groups = node.args[1]
    own: list[str] = []
    for group in groups.elts if isinstance(groups, ast.List) else []:
        names = re.findall(r"'[\w-]+/([\w.-]*(?:stral|ixtral)[\w.-]*)'\)", ast.unparse(group))
        template = group.args[1] if isinstance(group, ast.Call) and len(group.args) > 1 else None
        if template is None:
            own += names
        else:
            yield ast.unparse(template).rpartition(".")[2], template.lineno, sorted(set(names))
    yield ast.unparse(default).rpartition(".")[2], default.lineno, sorted(set(own))


def _slots(text: str, call: str, place: str) -> dict[str, Keys]:
    """Return the slots of each template of a file, by its name."""
    tree = ast.parse(text)
    defaults: Keys = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == call:
            for field in node.body:
                if (
                    isinstance(field, ast.AnnAssign)
                    and field.value is not None
                    and "lambda: " in ast.unparse(field.value)
                ):
                    written = ast.unparse(field.value).partition("lambda: ")[2].rstrip(")")
                    defaults[ast.unparse(field.target)] = _slot(written, field.lineno, place)
    found: dict[str, Keys] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == call:
            keywords = {key.arg: key.value for key in node.keywords if key.arg}
            named = keywords.pop("name", None) or (node.args[0] if node.args else None)
            if named is None:
                continue
            name = named.value if isinstance(named, ast.Constant) else ast.unparse(named).rpartition(".")[2]
            keys = dict(defaults)
            for key, value in zip(_IN_ORDER, node.args[1:], strict=False):
                keys[key] = _slot(ast.unparse(value), value.lineno, place)
            for key, value in keywords.items():
                if key == "default_system":
                    # its text is not recorded: whether there is one is the fact
                    is_none = isinstance(value, ast.Constant) and value.value is None
                    keys[key] = {"value": not is_none, "line": value.lineno, "path": place}
                elif key in _SLOTS:
                    keys[key] = _slot(ast.unparse(value), value.lineno, place)
            found[str(name)] = keys
    return found


_IN_ORDER = ("prefix", "prompt", "chat_sep", "suffix")
"""The slots of ms-swift's `TemplateMeta` behind the name, which may be given without their names."""
_SLOTS = (
    *("format_user", "format_assistant", "format_system", "format_prefix", "template_class"),
    *("prefix", "prompt", "chat_sep", "suffix", "system_prefix", "template_cls"),
)


def _slot(written: str, line: int, place: str) -> dict[str, Any]:
    """Return a slot: its parts, if it is or has a list of texts and named tokens; else as it is written."""
    listed = re.search(r"\[.*\]", written, flags=re.DOTALL)
    try:
        value = ast.literal_eval(listed.group()) if listed else written
    except (ValueError, SyntaxError):
        value = written
    if isinstance(value, list):
        value = [f"{{{next(iter(part))}}}" if isinstance(part, set) else part for part in value]
    return {"value": value, "line": line, "path": place}
